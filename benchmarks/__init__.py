"""What the maintainers measure: not in the package; run from the repository's root (python -m benchmarks.NAME)."""
