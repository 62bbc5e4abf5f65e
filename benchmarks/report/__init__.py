"""A page of result files, with tables and pictures: `python -m benchmarks.report FILE.json ... --html FILE`."""
