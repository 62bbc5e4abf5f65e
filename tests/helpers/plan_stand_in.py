"""What stands in for the process's plans: `PlanChoice` asks it anew for every call, and nothing is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastattn.backends.cudnn.graphs import PlanKey


class PlanStandIn:
    """Subclasses say what `get` returns. static, larger: whether static plans, and larger ones, are there."""

    recheck = 0.0
    static = larger = False

    def __init__(self) -> None:
        self.cache = self
        self._generation = 0

    @property
    def generation(self) -> int:
        """Never twice the same: no choice of a plan lasts."""
        self._generation += 1
        return self._generation

    def clock(self) -> float:
        return 0.0

    def get(self, key: PlanKey) -> Any:
        raise NotImplementedError

    def best(
        self,
        static: PlanKey | None,
        dynamic: PlanKey,
        larger: Callable[[], Iterable[PlanKey]] = tuple,
        trained: bool = False,
    ) -> Any:
        if static is not None and self.static:
            return self.get(static)
        return self.get(next(iter(larger()), dynamic) if self.larger else dynamic)

    def stats(self) -> dict[str, float]:
        return {}
