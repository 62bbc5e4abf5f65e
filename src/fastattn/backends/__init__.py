"""The backends, fastest first. What a backend is: see `base.py`; which one serves a call: see `../dispatch.py`."""
