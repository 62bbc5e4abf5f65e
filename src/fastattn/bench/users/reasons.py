"""Why fastattn is not the quickest in a row, in CUDA graphs: one sentence, with its full stop, for each such row of the
result file that is kept (`benchmarks/results/*/users.json`). `python -m benchmarks.choosing` puts them on the page and
asks for those that are missing; a test finds those whose row has become the quickest.
"""

from __future__ import annotations

REASONS: dict[str, str] = {}
