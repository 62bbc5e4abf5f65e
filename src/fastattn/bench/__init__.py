"""Benchmarks: a model generating (`model.py`), a model in training (`train.py`), single calls (`sweep.py`)."""
