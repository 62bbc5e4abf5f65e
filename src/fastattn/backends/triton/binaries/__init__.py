"""Binaries of our own kernels: compiled by another process, kept on disk, launched without Triton. Nobody waits.

`flag_set.py` says what a binary is, `store.py` which ones there are. `compilers.py` has them compiled by processes that
run `child.py`; `label.py` says what makes one on disk invalid.
"""
