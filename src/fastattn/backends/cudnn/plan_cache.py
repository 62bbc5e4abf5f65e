"""Which plans there are: one bounded cache for all kinds. It looks plans up, and builds each of them once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from ...common.forks import after_fork, renew_lock
from .graphs import PlanKey
from .plan import Plan

CAPACITY = 1024  #: plans kept; each holds about 100 KB of host memory and its share of compiled kernels
COUNTERS = (
    *("builds", "build_ms", "background_builds", "background_build_ms", "background_failures"),
    *("disk_loads", "disk_load_ms", "evictions"),
)


class PlanCache:
    """Least-recently-used plans by key. Thread-safe; a plan is built once however many threads ask for it."""

    def __init__(
        self,
        capacity: int = CAPACITY,
        load: Callable[[PlanKey], Plan | None] | None = None,
        build: Callable[[PlanKey], Plan] | None = None,
    ) -> None:
        """capacity: plans. load, build: where plans come from, `Plan.load` (the disk) and `Plan.build` by default."""
        self.capacity = capacity
        self.generation = 0  #: changes whenever a plan comes or goes
        self.evicted: list[Callable[[PlanKey], None]] = []  #: called with the key of each plan that is dropped
        self._load, self._build = load or Plan.load, build or Plan.build
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._building: dict[PlanKey, threading.Lock] = {}
        self._lock = threading.Lock()
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        after_fork(self, PlanCache._forked)

    def _forked(self) -> None:
        """In a forked child: threads that held a lock or were building a plan are not there."""
        renew_lock(self)
        self._building.clear()

    def find(self, key: PlanKey) -> Plan | None:
        """The plan for a key, if it is there."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def get(self, key: PlanKey) -> Plan:
        """The plan for a key, loaded or built now if it is not there."""
        return self.find(key) or self.make(key)

    def make(self, key: PlanKey, in_background: bool = False) -> Plan:
        """The plan for a key, loaded or built by this thread or by another that has begun. in_background: for the
        counters."""
        with self._lock:
            turn = self._building.setdefault(key, threading.Lock())
        with turn:
            try:
                found = self.find(key)  # another thread may have built it meanwhile
                if found is not None:
                    return found
                plan = self.load(key)
                if plan is not None:
                    return plan
                start = time.perf_counter()
                plan = self._build(key)
                self._add(key, plan, "background_build" if in_background else "build", start)
            finally:
                with self._lock:
                    self._building.pop(key, None)
        plan.store()
        return plan

    def load(self, key: PlanKey) -> Plan | None:
        """The plan for a key as it was kept on disk, if it was."""
        start = time.perf_counter()
        plan = self._load(key)
        if plan is not None:
            self._add(key, plan, "disk_load", start)
        return plan

    def count(self, counter: str) -> None:
        """Adds one to a counter of `COUNTERS`."""
        with self._lock:
            self._counters[counter] += 1

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()
            self.generation += 1

    def keys(self) -> set[PlanKey]:
        """Of the plans that are there."""
        with self._lock:
            return set(self._plans)

    def stats(self) -> dict[str, float]:
        """Counters.

        plans: held now. builds, build_ms: built while a caller waited, and the milliseconds it waited.
        background_builds, background_build_ms, background_failures: the same where nobody did. disk_loads,
        disk_load_ms: read from disk instead. evictions: dropped as least recently used.
        """
        with self._lock:
            return {"plans": len(self._plans), **self._counters}

    def _add(self, key: PlanKey, plan: Plan, counter: str, start: float) -> None:
        """Takes in a plan that came by what `counter` counts, begun at `start`."""
        gone = []
        with self._lock:
            self._counters[f"{counter}s"] += 1
            self._counters[f"{counter}_ms"] += (time.perf_counter() - start) * 1e3
            self._plans[key] = plan
            self.generation += 1
            while len(self._plans) > self.capacity:
                gone.append(self._plans.popitem(last=False)[0])
                self._counters["evictions"] += 1
        for key in gone:
            for tell in self.evicted:
                tell(key)
