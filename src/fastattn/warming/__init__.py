"""Kernels and plans built ahead. Read `run.py` first; `kinds.py` says which calls, `model.py` what a model needs."""
