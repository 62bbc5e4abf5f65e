"""Which backends have served calls."""

from __future__ import annotations

from collections import Counter

import fastattn


class Served:
    """The calls served since this was made, by backend, as `fastattn.stats()["calls"]` counts them."""

    def __init__(self) -> None:
        self._before = Counter(fastattn.stats()["calls"])

    def __call__(self) -> dict[str, int]:
        return dict(Counter(fastattn.stats()["calls"]) - self._before)
