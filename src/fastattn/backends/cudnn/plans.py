"""The plans of this process: which one serves a call, and builds in the background."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ...common.notice import warn_once
from ...shape_cache import Reason, Size, shape_cache
from ..base import Setback
from ..errors import says_memory
from . import runtime
from .graphs import PlanKey
from .plan import Plan
from .plan_cache import CAPACITY, PlanCache
from .plan_policy import MOST_CANDIDATES, OCCASION, Action, Candidates, policy
from .worker import Worker

DELAY = 0.5  #: seconds until a plan is built in the background: not in mid-prefill


class Plans:
    """A plan cache, the candidates for it, and the worker that builds them. A holder of `shape_cache`."""

    name = "plans"
    dropped_for: frozenset[Reason] = frozenset()

    def __init__(
        self,
        capacity: int = CAPACITY,
        *,
        load: Callable[[PlanKey], Plan | None] | None = None,
        build: Callable[[PlanKey], Plan] | None = None,
        clock: Callable[[], float] = time.monotonic,
        occasion: float = OCCASION,
        delay: float = DELAY,
        worker: Worker | None = None,
    ) -> None:
        """capacity, load, build: of the `PlanCache`. clock, occasion: of the `Candidates`. delay: seconds until a
        build in the background begins."""
        self.cache = PlanCache(capacity, load, build)
        self.candidates = Candidates(clock, occasion)
        self.cache.evicted.append(self.candidates.drop)  # it may come back
        self.clock, self._occasion, self._delay = clock, occasion, delay
        self._worker = worker or Worker(runtime.allow_during_captures)

    @property
    def recheck(self) -> float:
        """Seconds after which a call that uses another plan asks for its static one again, so that occasions are
        counted."""
        return self._occasion / 4

    def get(self, key: PlanKey) -> Plan:
        """The plan for a key, built now if it is not there."""
        return self.cache.get(key)

    def best(
        self,
        static: PlanKey | None,
        dynamic: PlanKey,
        larger: Callable[[], Iterable[PlanKey]] = tuple,
        trained: bool = False,
    ) -> Plan:
        """The static plan if it is there, else the dynamic one, or one of the larger ones if that is there.

        If none is, the dynamic one is built now, and the next larger one in the background: lengths vary. A static plan
        that has been missed often enough (`plan_policy`) is built in the background; nobody waits for it.
        trained: the call has gradients.
        """
        if static is not None:
            now = policy()
            if now == "static":
                return self.get(static)
            if now == "auto":
                plan = self.cache.find(static)
                if plan is not None:
                    return plan
                self._missed(static, trained)
        plan = self.cache.find(dynamic)
        if plan is not None:
            return plan
        # (Deterministic algorithms: another plan may round differently.)
        alone = torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled()
        others = [] if alone else list(larger())
        for key in others:
            plan = self.cache.find(key)
            if plan is not None:
                self._build_later(dynamic)
                return plan
        plan = self.cache.make(dynamic)
        if others:
            self._build_later(others[0])
        return plan

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits, for at most `timeout` seconds, until no plan is being built in the background. True if none is."""
        return self._worker.wait(timeout)

    def stats(self) -> dict[str, float]:
        """See `PlanCache.stats`."""
        return self.cache.stats()

    def clear(self) -> None:
        self.candidates.clear()
        self.cache.clear()

    def size(self) -> Size:
        """(What a plan takes on the device, its kernels, nobody can tell.)"""
        known = self.cache.keys() | self.candidates.keys()
        return Size(len(known), max_entries=self.cache.capacity + MOST_CANDIDATES)

    def _missed(self, key: PlanKey, trained: bool) -> None:
        # While a CUDA graph is captured, no thread of the process may make certain calls.
        if torch.cuda.is_current_stream_capturing():
            return
        action = self.candidates.missed(key, trained)
        if action is Action.BUILD:
            self._submit(key)
        elif action is Action.LOAD:
            self._worker.submit(partial(self._load, key))

    def _build_later(self, key: PlanKey) -> None:
        if self.candidates.wanted(key) is Action.BUILD:
            self._submit(key)

    def _submit(self, key: PlanKey) -> None:
        if not self._worker.submit(partial(self._build, key), self._delay):
            self.candidates.failed(key, for_now=True)

    def _load(self, key: PlanKey) -> None:
        """By the worker."""
        if self.cache.load(key) is not None:
            self.candidates.ready(key)

    def _build(self, key: PlanKey) -> None:
        """By the worker."""
        self.candidates.building(key)
        try:
            self.cache.make(key, in_background=True)
            self.candidates.ready(key)
        except Exception as error:
            self.candidates.failed(key, for_now=isinstance(error, Setback) or says_memory(error))
            self.cache.count("background_failures")
            warn_once(
                f"fastattn: a cuDNN plan could not be built in the background ({error}). Calls go on with the "
                "dynamic plan; FASTATTN_PLANS=dynamic stops the attempts.",
                kind="background build",
            )


shared = Plans()  #: the process's
shape_cache.register(shared)


class PlanChoice:
    """The plan for one kind of call, looked up again only when plans have come or gone, or the policy has changed."""

    __slots__ = ("_check_at", "_dynamic", "_found", "_larger", "_plans", "_seen", "_static", "_trained")

    def __init__(
        self,
        plans: Plans,
        static: PlanKey | None,
        dynamic: PlanKey,
        larger: Callable[[], Iterable[PlanKey]] = tuple,
        trained: bool = False,
    ) -> None:
        """plans: where to look. The others: see `Plans.best`."""
        self._plans = plans
        self._static = static
        self._dynamic = dynamic
        self._larger = larger
        self._trained = trained
        self._found: tuple[Plan, bool] | None = None
        self._seen: tuple[int, str] = -1, ""  #: the cache's generation and the policy, then
        self._check_at = 0.0

    def plan(self) -> tuple[Plan, bool]:
        """What `Plans.best` finds, and whether it is the static plan."""
        seen = self._plans.cache.generation, policy()
        found = self._found
        if found is not None and self._seen == seen and self._plans.clock() < self._check_at:
            return found
        plan = self._plans.best(self._static, self._dynamic, self._larger, self._trained)
        is_static = plan.key == self._static
        self._found, self._seen = (plan, is_static), seen
        # Until a static plan is there, its misses are to be counted.
        self._check_at = math.inf if is_static or self._static is None else self._plans.clock() + self._plans.recheck
        return plan, is_static
