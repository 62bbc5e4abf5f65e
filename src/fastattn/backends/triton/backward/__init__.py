"""Backward in plain Triton: every feature, on every GPU that Triton serves; bits that repeat. See `launch.py`."""

from .. import prefill as _prefill  # noqa: F401  (each of the two imports the other: this order works from any module)
