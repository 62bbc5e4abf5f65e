"""All figures that are kept, made anew on one commit: `python -m benchmarks.figures`. `jobs.py` has the table of
commands, `running.py` runs them, `__main__.py` is the command."""
