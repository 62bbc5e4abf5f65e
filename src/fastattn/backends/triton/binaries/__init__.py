"""Binaries of our own kernels: compiled by another process, kept on disk, launched without Triton. Nobody waits.

`flag_set.py` says what a binary is, `store.py` which ones there are, `policy.py` who waits. `compilers.py` has them
compiled by processes (`process.py`) that run `child.py`; `label.py` says what makes one on disk invalid.
`triton_kernel.py` and `launcher.py` are for plain Triton kernels.
"""
