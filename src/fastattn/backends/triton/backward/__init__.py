"""Backward in plain Triton: every feature, on every GPU that Triton serves; bits that repeat. See `launch.py`."""
