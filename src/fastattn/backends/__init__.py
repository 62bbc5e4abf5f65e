"""The backends. What a backend is: `base.py`; which one serves a call: `dispatch/routes.py`."""
