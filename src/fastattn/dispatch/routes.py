"""Which backend serves a call, and why not the others."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends.base import Backend, Compiled, Kernel, OutOfMemory, Refusal, Setback
from ..call import CALL, Call, Problem
from ..common.notice import warn_once
from ..shape_cache import Reason, shape_cache
from . import preference, registry
from .refusals import LateRefusal, late_refusal, record
from .registry import BackendError

_routes = shape_cache.section("routes", 1 << 13, dropped_for=[Reason.BACKEND_REFUSED, Reason.BINARY_READY])
_in_graphs = shape_cache.section("backwards in graphs", 1 << 12)  #: see `names_for_a_graph`


class Route(NamedTuple):
    """Where all calls of one kind go, their forward or their backward."""

    problem: Problem
    backend: Backend
    kernel: Kernel
    #: 0: no backend that would take the problem was passed over; else one was, for a late refusal, and this is when it
    #: is asked again (by time.monotonic()), inf for never.
    until: float = 0.0
    coming: bool = False  #: the one passed over is to serve as soon as its binary is there, which drops the route

    @property
    def lasts(self) -> bool:
        """Whether it holds for good."""
        return self.until in (0.0, math.inf) and not self.coming

    @property
    def holds(self) -> bool:
        """Whether it holds now."""
        return not self.until or time.monotonic() < self.until


def generation() -> int:
    """Another number once routes no longer hold: a backend has refused a call, or the user has cleared the caches."""
    return _routes.generation


def route(call: Call, names: tuple[str, ...], waits: bool = True, backward: bool = False) -> Route:
    """The route of a call's forward, or of its backward, over the named backends. Raises BackendError with every
    refusal.

    waits: where nobody but a backend whose binary is not there could serve the call, have it compiled and wait for it;
    else that is one refusal more.
    """
    # The kind is everything that Problem.of and Backend.bind read; these two and the backends' reasons take ten times
    # as long as the look-up.
    key = CALL.kind(call), names, backward and (True, torch.are_deterministic_algorithms_enabled())
    found: Route | None = _routes.get(key)
    if found is not None and found.coming and _calls_wait():
        found = None
    tried: set[str] = set()
    while found is None or not found.holds:
        seen = shape_cache.drops(Reason.BINARY_READY)
        problem = Problem.of(call, backward)
        chosen, until, coming = _select(problem, names, waits, tried)
        try:
            kernel = chosen.bind(problem, call)
        except Refusal as error:  # what it lacks shows when a kernel is bound
            if isinstance(error, Setback) and chosen.name in tried:  # nobody else is left
                if isinstance(error, OutOfMemory):
                    raise
                raise nobody(reasons(problem, names)) from error
            tried.add(chosen.name)
            record(chosen.name, problem, error)
            continue
        found = _routes[key] = Route(problem, chosen, kernel, until, coming)
        if coming and shape_cache.drops(Reason.BINARY_READY) != seen:  # it came before the route could be dropped
            _routes.pop(key, None)
            found = None
    return found


def reasons(problem: Problem, names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """For each allowed backend in order, why it cannot serve the problem; an empty list means that it can."""
    names = registry.allowed() if names is None else tuple(names)
    followers = _followers(problem, names)
    return {name: _reasons(name, problem, followers) for name in preference.ordered(problem, names)}


def select(problem: Problem, names: Sequence[str]) -> Backend:
    """The first backend of the list that can serve the problem. Raises BackendError with every refusal."""
    return _select(problem, names)[0]


def nobody(refusals: dict[str, list[str]]) -> BackendError:
    """The error for a call that every allowed backend refuses."""
    if not refusals:
        return BackendError(
            "no backend is allowed: FASTATTN_BACKENDS names cudnn alone and FASTATTN_CUDNN=0 forbids it"
        )
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in refusals.items())
    return BackendError(f"no allowed backend can serve this call:\n{listed}")


def _reasons(name: str, problem: Problem, followers: Sequence[Backend] | None) -> list[str]:
    """What a backend refuses by itself, what it refused when it was called, and what it would."""
    backend, late = registry.backend(name), _late(name, problem)
    why = [*_own_reasons(backend, problem, followers), *([late.why] if late else [])]
    return why or _not_ready(backend, problem)


def _followers(problem: Problem, names: Sequence[str]) -> list[Backend] | None:
    """Of a forward with gradients: the backends that could run its backward. None: no backward follows."""
    if problem.backward or not problem.grads:
        return None
    after = replace(problem, backward=True)
    return [backend for backend in map(registry.backend, names) if not backend.reasons(after)]


def _own_reasons(backend: Backend, problem: Problem, followers: Sequence[Backend] | None) -> list[str]:
    """What a backend refuses by itself; and, of a forward, that nobody could go on from what it gives."""
    why = backend.reasons(problem)
    if why or followers is None:
        return why
    if not followers:
        return ["no allowed backend has its backward"]
    if not backend.gives_lse and all(other.reads_lse for other in followers):
        return ["does not give the log-sum-exp that the backward needs"]
    return []


def names_for_backward(forward: Backend, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the backends that may run the backward of a call whose forward one of them ran."""
    return names if forward.gives_lse else tuple([name for name in names if not registry.backend(name).reads_lse])


def first_choice(problem: Problem, names: tuple[str, ...]) -> Backend | None:
    """The backend that serves a problem as long as none refuses it when it is called."""
    followers = _followers(problem, names)
    backends = map(registry.backend, preference.ordered(problem, names))
    return next((backend for backend in backends if not _own_reasons(backend, problem, followers)), None)


def names_for_a_graph(call: Call, names: tuple[str, ...]) -> tuple[str, ...]:
    """As `names_for_backward`, of the first choice for the forward: whoever ran it has left the log-sum-exp out only if
    that one would have."""
    key = CALL.kind(call), names
    found: tuple[str, ...] | None = _in_graphs.get(key)
    if found is None:
        first = first_choice(Problem.of(call), names)
        found = _in_graphs[key] = names if first is None else names_for_backward(first, names)
    return found


def _not_ready(backend: Backend, problem: Problem) -> list[str]:
    """That the binary of a problem is not there, without having it compiled."""
    if not isinstance(backend, Compiled):
        return []
    from ..backends.triton.binaries.store import shared

    own = next(iter(backend.binaries(problem)), None)
    if own is None or _calls_wait() or shared.find(own) is not None:
        return []
    return [shared.state(own)[0] or f"its kernel could not be compiled: {shared.failed(own)}"]


def _late(name: str, problem: Problem, tried: Container[str] = ()) -> LateRefusal | None:
    """As `late_refusal`; but a call that is to wait for its kernel does, if another one was served without. tried:
    backends that it has tried to wait for."""
    found = late_refusal(name, problem)
    return None if found is not None and found.make is not None and name not in tried and _calls_wait() else found


def _calls_wait() -> bool:
    """Whether calls wait for their kernels here and now."""
    from ..backends.triton.binaries.policy import mode

    return mode() == "wait"


def _select(
    problem: Problem, names: Sequence[str], waits: bool = True, tried: Container[str] = ()
) -> tuple[Backend, float, bool]:
    """The same as `select`, and how long the choice holds: see `Route`. tried: see `_late`."""
    refusals: dict[str, list[str]] = {}
    until, coming, waiting = 0.0, False, None
    unmade: list[tuple[str, LateRefusal]] = []
    followers = _followers(problem, names)
    for name in preference.ordered(problem, tuple(names)):
        why = _own_reasons(registry.backend(name), problem, followers)
        late = None if why else _late(name, problem, tried)
        if not why and late is None:
            if name == "reference" and problem.device == "cuda" and not problem.empty and not coming:
                _warn_slow(refusals)
            return registry.backend(name), until, coming
        if late is not None:
            why = [late.why]
            until = min(until or math.inf, late.until)
            coming |= late.coming
            if late.make is not None:
                unmade.append((name, late))
            elif waiting is None and late.until < math.inf:
                waiting = name
        refusals[name] = why
    if waiting is not None:  # nobody else is left: it may go well now
        return registry.backend(waiting), until, False
    for name, late in unmade if waits else ():  # nobody else is left: the call waits
        try:
            late.make()  # type: ignore[misc]
        except Refusal as error:
            refusals[name] = [str(error)]
        else:
            return registry.backend(name), until, False
    raise nobody(refusals)


def _warn_slow(refusals: dict[str, list[str]]) -> None:
    text = "; ".join(f"{name}: {', '.join(why)}" for name, why in refusals.items())
    warn_once(
        f"fastattn: a CUDA call runs on the exact but slow reference ({text or 'it was asked for'}). "
        "Run `fastattn doctor` to see what this machine lacks, and fastattn.explain(...) with the call's arguments "
        "to see what would have to change in the call.",
        kind=re.sub(r"\d+", "#", text),  # the same reason for other shapes is the same reason
    )
