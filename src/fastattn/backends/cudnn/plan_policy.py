"""When a static plan is worth building: which plans may serve a call, and how often a shape has to come back first."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from ...common.forks import after_fork, renew_lock
from ...common.notice import warn_once
from ...config import any_set, choice
from .graphs import PlanKey

#: Values of FASTATTN_PLANS, and the names that two of them had before.
POLICIES = ("auto", "static", "dynamic")
FORMER = {"exact": "static", "any": "dynamic"}
_ALLOWED = (*POLICIES, *FORMER)
OCCASION = 1.0  #: seconds; misses closer than this are one occasion: the layers of a model, one after another
TRAINED_AFTER = 2  #: occasions after which a shape that is trained on is taken to be one that comes back
#: The same without gradients. The frontend holds the interpreter's lock while cuDNN builds a plan: the process's other
#: threads stand still for 50 to 70 ms, or for a second where cuDNN has to compile a kernel. Training does not notice;
#: what generates text does, and a plan saves it 15 us a call. (A prompt of 32768 tokens in steps has 16 shapes.)
SERVED_AFTER = 16
#: Seconds until a plan that could not be built for now (no memory, no thread) is tried again; doubled each time.
FIRST_RETRY, LAST_RETRY = 10.0, 600.0
MOST_CANDIDATES = 1 << 14  #: shapes without a plan that are counted


def policy() -> str:
    """Which plans may serve: FASTATTN_PLANS, "auto" unless set.

    "auto": the dynamic plan, and the static one once it was built in the background. "static": always the static plan,
    built at once. "dynamic": always the dynamic plan; so it is with "auto", too, under torch's deterministic
    algorithms: two plans round differently, and which of them serves a call depends on when the build was done.
    ValueError: the variable is set to something else.
    """
    chosen = choice("FASTATTN_PLANS", _ALLOWED, "auto") if any_set("FASTATTN_PLANS") else "auto"
    if chosen in FORMER:
        warn_once(f"fastattn: FASTATTN_PLANS={chosen} is now called {FORMER[chosen]}; the old name will go.")
        chosen = FORMER[chosen]
    return "dynamic" if chosen != "static" and torch.are_deterministic_algorithms_enabled() else chosen


class State(Enum):
    """What is known of a plan that calls have asked for."""

    MISSED = "missed"  #: not there, and not yet worth building
    QUEUED = "queued"  #: to be built in the background
    BUILDING = "building"  #: in hand
    READY = "ready"  #: in the plan cache
    FAILED = "failed"  #: could not be built; tried again at `Candidate.retry_at`


class Action(Enum):
    """What to do about a plan that was missed."""

    NOTHING = "nothing"
    LOAD = "load"  #: look for it on disk, in the background
    BUILD = "build"  #: build it in the background


@dataclass(slots=True)
class Candidate:
    """A plan that calls have asked for."""

    state: State = State.MISSED
    occasions: int = 0  #: on which it was missed
    last_missed: float = -math.inf  #: by the clock
    retry_at: float = math.inf  #: when it may be tried again; inf: never
    wait: float = FIRST_RETRY  #: seconds, after the next failure


class Candidates:
    """The states of plans that calls have asked for, by key: bounded, thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, occasion: float = OCCASION) -> None:
        """clock: seconds. occasion: see `OCCASION`."""
        self._clock, self._occasion = clock, occasion
        self._found: dict[PlanKey, Candidate] = {}
        self._lock = threading.Lock()
        after_fork(self, Candidates._forked)

    def _forked(self) -> None:
        """In a forked child: the worker that was to build them is not there."""
        renew_lock(self)
        for found in self._found.values():
            if found.state in (State.QUEUED, State.BUILDING):
                found.state = State.MISSED

    def missed(self, key: PlanKey, trained: bool) -> Action:
        """Counts a miss. Returns what to do, once for each time that it is to be done.

        trained: the call has gradients.
        """
        now = self._clock()
        enough = TRAINED_AFTER if trained else SERVED_AFTER
        with self._lock:
            found = self._get(key)
            if now - found.last_missed < self._occasion:
                return Action.NOTHING
            found.occasions, found.last_missed = found.occasions + 1, now
            if found.state in (State.QUEUED, State.BUILDING):
                return Action.NOTHING
            due = now >= found.retry_at if found.state is State.FAILED else found.occasions >= enough
            if due:
                found.state = State.QUEUED
                return Action.BUILD
            # One that is on disk came back in another process.
            return Action.LOAD if found.occasions == 1 else Action.NOTHING

    def wanted(self, key: PlanKey) -> Action:
        """The same for a plan that is to be built whatever it was missed for."""
        with self._lock:
            found = self._get(key)
            waits = found.state is State.FAILED and self._clock() < found.retry_at
            if found.state in (State.QUEUED, State.BUILDING) or waits:
                return Action.NOTHING
            found.state = State.QUEUED
            return Action.BUILD

    def building(self, key: PlanKey) -> None:
        self._set(key, State.BUILDING)

    def ready(self, key: PlanKey) -> None:
        self._set(key, State.READY)

    def failed(self, key: PlanKey, for_now: bool) -> None:
        """for_now: what was in the way may go, so it is tried again, after a time that grows."""
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                found.state, found.retry_at = State.FAILED, math.inf
                if for_now:
                    found.retry_at, found.wait = self._clock() + found.wait, min(2 * found.wait, LAST_RETRY)

    def state(self, key: PlanKey) -> State | None:
        """None: no call has asked for it."""
        with self._lock:
            found = self._found.get(key)
            return None if found is None else found.state

    def drop(self, key: PlanKey) -> None:
        with self._lock:
            self._found.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._found.clear()

    def keys(self) -> set[PlanKey]:
        with self._lock:
            return set(self._found)

    def _get(self, key: PlanKey) -> Candidate:
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MOST_CANDIDATES:  # lengths that never came back
                self._found.clear()
            found = self._found[key] = Candidate()
        return found

    def _set(self, key: PlanKey, state: State) -> None:
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                found.state = state
