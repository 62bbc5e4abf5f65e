"""Which plans there are: one cache for all kinds, the choice of one for a call, and builds in the background."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ... import shape_cache as memo
from ...common.forks import after_fork, renew_lock
from ...common.notice import warn_once
from ...config import choice
from ..base import Setback
from ..errors import says_memory
from . import runtime
from .graphs import PlanKey
from .plan import Plan as Plan
from .plan import PlanError as PlanError
from .worker import Worker

CAPACITY = 1024  #: plans kept; each holds about 100 KB of host memory and its share of compiled kernels
COUNTERS = (
    *("builds", "build_ms", "background_builds", "background_build_ms", "background_failures"),
    *("disk_loads", "disk_load_ms", "evictions"),
)
OCCASION = 1.0  #: seconds; misses closer than this are one occasion: the layers of a model, one after another
EXACT_AFTER = 2  #: occasions after which a shape that is trained on is taken to be one that comes back
#: The same without gradients. The frontend holds the interpreter's lock while cuDNN builds a plan: the process's other
#: threads stand still for 50 to 70 ms, or for a second where cuDNN has to compile a kernel. Training does not notice;
#: what generates text does, and a plan saves it 15 us a call. (A prompt of 32768 tokens in steps has 16 shapes.)
SERVED_AFTER = 16
DELAY = 0.5  #: seconds until its plan is built: not in mid-prefill
#: Seconds until what failed in the background for now (no memory, no thread) is tried again; doubled each time.
FIRST_RETRY, LAST_RETRY = 10.0, 600.0
POLICIES = ("auto", "exact", "any")


@dataclass(slots=True)
class _Wish:
    """What is known of a plan that is not there."""

    occasions: int = 0  #: on which it was missed
    last: float = -math.inf  #: when that was
    submitted: bool = False  #: for the background to build
    retry: float = math.inf  #: when it may be submitted again
    wait: float = FIRST_RETRY  #: after the next failure


class PlanCache:
    """Least-recently-used plans by key. Thread-safe; a plan is built once however many threads ask for it."""

    name = "plans"

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.generation = 0  #: changes whenever a plan comes or goes
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._building: dict[PlanKey, threading.Lock] = {}
        self._asked: dict[PlanKey, _Wish] = {}
        self._lock = threading.Lock()
        after_fork(self, PlanCache._forked)
        self._stats: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._worker = Worker(runtime.allow_during_captures)

    def _forked(self) -> None:
        """In a forked child: threads that held a lock or were building a plan are not there."""
        renew_lock(self)
        self._building.clear()

    def get(self, key: PlanKey) -> Plan:
        """The plan for a key, built now if it is not there."""
        return self._find(key) or self._make(key, "")

    def best(
        self,
        exact: PlanKey | None,
        general: PlanKey,
        larger: Callable[[], Iterable[PlanKey]] = tuple,
        trained: bool = False,
    ) -> Plan:
        """The exact plan if it is there, else the general one, or one of the larger ones if that is there.

        If none is, the general one is built now, and the next larger one in the background: lengths vary.

        An exact plan that has been missed on `SERVED_AFTER` occasions (`EXACT_AFTER`, where the call is `trained`: it
        has gradients) is built in the background; nobody waits for it.
        See `policy` for what changes that.
        """
        if exact is not None:
            now = policy()
            if now == "exact":
                return self.get(exact)
            if now != "any":
                plan = self._find(exact)
                if plan is not None:
                    return plan
                self._miss(exact, EXACT_AFTER if trained else SERVED_AFTER)
        plan = self._find(general)
        if plan is not None:
            return plan
        # (Deterministic algorithms: another plan may round differently.)
        alone = torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled()
        others = [] if alone else list(larger())
        for key in others:
            plan = self._find(key)
            if plan is not None:
                self._later(general)
                return plan
        plan = self._make(general, "")
        if others:
            self._later(others[0])
        return plan

    def _later(self, key: PlanKey) -> None:
        """Has a plan built in the background, once."""
        with self._lock:
            wish = self._asked.setdefault(key, _Wish())
            if wish.submitted and time.monotonic() < wish.retry:
                return
            wish.submitted, wish.retry = True, math.inf
        self._submit(key)

    def _submit(self, key: PlanKey) -> None:
        """Has a plan built by the worker, or, where that cannot be, asks for it later."""
        if not self._worker.submit(partial(self._make_in_background, key), DELAY):
            self._again(key)

    def _again(self, key: PlanKey) -> None:
        with self._lock:
            wish = self._asked.get(key)
            if wish is not None:
                wish.retry = time.monotonic() + wish.wait
                wish.wait = min(2 * wish.wait, LAST_RETRY)

    def wait(self, timeout: float = 60.0) -> bool:
        """Waits, for at most `timeout` seconds, until no plan is being built in the background. True if none is."""
        return self._worker.wait(timeout)

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()
            self._asked.clear()
            self.generation += 1

    def forget(self) -> None:
        """See `memo.Kept`."""
        self.clear()

    def holds(self) -> tuple[int, int]:
        """See `memo.Kept`. (What a plan takes on the device, its kernels, nobody can tell.)"""
        with self._lock:
            return len(self._plans.keys() | self._asked.keys()), 0

    def stats(self) -> dict[str, float]:
        with self._lock:
            return {"plans": len(self._plans), **self._stats}

    def _find(self, key: PlanKey) -> Plan | None:
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def _miss(self, key: PlanKey, enough: int) -> None:
        """enough: occasions after which the plan is worth its price."""
        # While a CUDA graph is captured, no thread of the process may make certain calls.
        if torch.cuda.is_current_stream_capturing():
            return
        now = time.monotonic()
        with self._lock:
            wish = self._asked.get(key)
            if wish is None:
                if len(self._asked) > 16 * self.capacity:  # lengths that never came back
                    self._asked.clear()
                wish = self._asked[key] = _Wish()
            if now - wish.last < OCCASION:
                return
            wish.occasions, wish.last = wish.occasions + 1, now
            first = wish.occasions == 1
            build = now >= wish.retry if wish.submitted else wish.occasions >= enough
            if build:
                wish.submitted, wish.retry = True, math.inf
        if build:
            self._submit(key)
        elif first:  # one that is on disk came back in another process
            self._worker.submit(partial(self._load_in_background, key))

    def _make(self, key: PlanKey, kind: str) -> Plan:
        with self._lock:
            turn = self._building.setdefault(key, threading.Lock())
        with turn:
            try:
                found = self._find(key)  # another thread may have built it meanwhile
                if found is not None:
                    return found
                start = time.perf_counter()
                plan, what = Plan.load(key), "disk_load"
                if plan is None:
                    plan, what = Plan.build(key), f"{kind}build"
                self._add(key, plan, what, start)
            finally:
                with self._lock:
                    self._building.pop(key, None)
        if what != "disk_load":
            plan.store()
        return plan

    def _load_in_background(self, key: PlanKey) -> None:
        start = time.perf_counter()
        plan = Plan.load(key)
        if plan is not None:
            self._add(key, plan, "disk_load", start)

    def _add(self, key: PlanKey, plan: Plan, what: str, start: float) -> None:
        """Takes in a plan that came by `what`, begun at `start`."""
        with self._lock:
            self._stats[f"{what}s"] += 1
            self._stats[f"{what}_ms"] += (time.perf_counter() - start) * 1e3
            self._plans[key] = plan
            self.generation += 1
            while len(self._plans) > self.capacity:
                gone, _ = self._plans.popitem(last=False)
                self._asked.pop(gone, None)  # it may come back
                self._stats["evictions"] += 1

    def _make_in_background(self, key: PlanKey) -> None:
        try:
            self._make(key, "background_")
        except Exception as error:  # submitted, so not tried again, unless what was in the way may go
            with self._lock:
                self._stats["background_failures"] += 1
            if isinstance(error, Setback) or says_memory(error):
                self._again(key)
            warn_once(
                f"fastattn: a cuDNN plan could not be built in the background ({error}). Calls go on with the "
                "any-length plan; FASTATTN_PLANS=any stops the attempts.",
                kind="background build",
            )


cache = PlanCache()
memo.register(cache)


class Choice:
    """The plan for one kind of call, remembered until the cache or the policy changes."""

    __slots__ = ("_again", "_exact", "_found", "_general", "_larger", "_state", "_trained")

    def __init__(
        self,
        exact: PlanKey | None,
        general: PlanKey,
        larger: Callable[[], Iterable[PlanKey]] = tuple,
        trained: bool = False,
    ) -> None:
        self._exact = exact
        self._general = general
        self._larger = larger
        self._trained = trained
        self._found: tuple[Plan, bool] | None = None
        self._state: tuple[int, str] = -1, ""
        self._again = 0.0

    def plan(self) -> tuple[Plan, bool]:
        """What `PlanCache.best` finds, and whether it is the exact plan."""
        state = cache.generation, policy()
        found = self._found
        if found is not None and self._state == state and time.monotonic() < self._again:
            return found
        plan = cache.best(self._exact, self._general, self._larger, self._trained)
        is_exact = plan.key == self._exact
        self._found, self._state = (plan, is_exact), state
        # Until an exact plan is there the cache has to hear now and then that the shape is still wanted.
        self._again = math.inf if is_exact or self._exact is None else time.monotonic() + OCCASION / 4
        return plan, is_exact


def policy() -> str:
    """Which plans may serve: FASTATTN_PLANS, "auto" unless set.

    "exact": always the exact plan, built at once. "any": never, and neither under torch's deterministic algorithms: two
    plans round differently, and which one serves a call depends on when the worker was done. ValueError: it is set to
    something else.
    """
    chosen = choice("FASTATTN_PLANS", POLICIES, "auto")
    return "any" if chosen != "exact" and torch.are_deterministic_algorithms_enabled() else chosen


def stats() -> dict[str, float]:
    """Counters of the plan cache.

    plans: held now. builds, build_ms: built while a caller waited, and the milliseconds it waited. background_builds,
    background_build_ms, background_failures: the same where nobody did. disk_loads, disk_load_ms: not built but read
    from disk. evictions: dropped as least recently used.
    """
    return cache.stats()


def clear_plans() -> None:
    """Forgets every cuDNN plan of this process, and all else that is remembered of kinds of calls (`stats()["kept"]`):
    routes, launches, offsets and scratch memory on the GPU, what backends have refused. The next calls make it again.
    Counters go on."""
    cache.clear()
    memo.forget_all()
