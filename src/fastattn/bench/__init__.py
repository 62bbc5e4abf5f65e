"""Benchmarks: a whole model (`model.py`), and what every result file carries (`results.py`)."""
