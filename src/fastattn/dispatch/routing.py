"""Which backend serves a call, and why not the others.

The rule is one list, fastest first; the first backend without a reason to refuse serves the call. `FASTATTN_BACKENDS`
(a comma-separated list), `FASTATTN_CUDNN=0` and `use_backend` shorten or reorder the list.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from .. import shape_cache as memo
from .._compat.torch import constant_when_traced
from ..backends.base import Backend, OutOfMemory, Refusal, Runner, Setback
from ..backends.errors import failure_of, give_back
from ..call import Call, Problem
from ..common.forks import after_fork, renew_lock
from ..common.notice import warn_once
from ..config import is_on, setting
from ..shape_cache import Memo

NAMES = ("decode", "cudnn", "torch", "reference")  #: all backends, in the order in which they are asked

_chosen: ContextVar[tuple[str, ...] | None] = ContextVar("fastattn_backends", default=None)
#: True inside torch's operators, where the memory that is allocated may be a captured graph's.
opaque: ContextVar[bool] = ContextVar("fastattn_opaque", default=False)
_calls: Counter[str] = Counter()
_lock = threading.Lock()
#: Seconds until a backend that had a setback is asked again, doubled each time that it has another one at once.
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
T = TypeVar("T")


after_fork(sys.modules[__name__], renew_lock)
#: What `api.py` remembers of whole calls; here because it has to go when a route does.
fast_path: Memo[Any, Any] = Memo(1 << 12, "calls")
_routes: Memo[Any, Route] = Memo(1 << 13, "routes")
_refused: Memo[tuple[str, Problem], _Late] = Memo(1 << 12, "refusals")


class BackendError(ValueError):
    """No allowed backend can serve a call; the text lists every refusal."""


@cache
def backend(name: str) -> Backend:
    """The backend of that name; its module is imported on first use."""
    if name == "decode":
        from ..backends.triton.decode import DecodeBackend

        return DecodeBackend()
    if name == "cudnn":
        from ..backends.cudnn import CudnnBackend

        return CudnnBackend()
    if name == "torch":
        from ..backends.torch import TorchBackend

        return TorchBackend()
    from ..backends.reference import ReferenceBackend

    return ReferenceBackend()


def check_names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError, naming the argument, unless all are backends."""
    unknown = [name for name in names if not isinstance(name, str) or name not in NAMES]
    if unknown or not names:
        found = ", ".join(str(name) for name in unknown) or "none"
        raise ValueError(f"{argument}: expected one or more of {', '.join(NAMES)}, got {found}")
    return tuple(names)


def listed() -> tuple[str, ...]:
    """FASTATTN_BACKENDS."""
    value = setting("FASTATTN_BACKENDS")
    return NAMES if not value else check_names([n.strip() for n in value.split(",")], "FASTATTN_BACKENDS")


@constant_when_traced
def allowed() -> tuple[str, ...]:
    """The backends that may serve a call here and now, in order. Under torch.compile: when the graph was traced."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    names = listed()
    if not is_on("FASTATTN_CUDNN", True):
        names = tuple(name for name in names if name != "cudnn")
    return names


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Within the block, only the named backends serve calls (of this thread or task), in the order given.

    names: one or more of "decode", "cudnn", "torch", "reference". A call that none of them can serve raises
    `BackendError`, a ValueError. Takes precedence over `FASTATTN_BACKENDS` and `FASTATTN_CUDNN`. The backward of a
    call is computed by the backends that were allowed in its forward.
    """
    token = _chosen.set(check_names(names, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def reasons(problem: Problem, names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """For each allowed backend in order, why it cannot serve the problem; an empty list means that it can."""
    return {name: _reasons(name, problem) for name in (allowed() if names is None else names)}


class _Late(NamedTuple):
    """What a backend found out when it was called."""

    why: str
    until: float  #: when it is asked again, by time.monotonic(); inf: never
    wait: float  #: seconds between


def _late(name: str, problem: Problem) -> _Late | None:
    found = _refused.get((name, problem))
    return found if found is not None and time.monotonic() < found.until else None


def _reasons(name: str, problem: Problem) -> list[str]:
    """What a backend says, and what it found out when it was called (`refuse`)."""
    late = _late(name, problem)
    return [*backend(name).reasons(problem), *([late.why] if late else [])]


def select(problem: Problem, names: Sequence[str]) -> Backend:
    """The first backend of the list that can serve the problem. Raises BackendError with every refusal."""
    return _select(problem, names)[0]


def _select(problem: Problem, names: Sequence[str]) -> tuple[Backend, float]:
    """The same, and until when the choice holds: see `Route.until`."""
    refusals: dict[str, list[str]] = {}
    until, waiting = 0.0, None
    for name in names:
        why = backend(name).reasons(problem)
        late = None if why else _late(name, problem)
        if not why and late is None:
            if name == "reference" and problem.device == "cuda" and not problem.empty:
                _warn_slow(refusals)
            return backend(name), until
        if late is not None:
            why = [late.why]
            until = min(until or math.inf, late.until)
            waiting = waiting or (name if late.until < math.inf else None)
        refusals[name] = why
    if waiting is not None:  # nobody else is left: it may go well now
        return backend(waiting), time.monotonic()
    raise _nobody(refusals)


def _nobody(refusals: dict[str, list[str]]) -> BackendError:
    if not refusals:
        return BackendError(
            "no backend is allowed: FASTATTN_BACKENDS names cudnn alone and FASTATTN_CUDNN=0 forbids it"
        )
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in refusals.items())
    return BackendError(f"no allowed backend can serve this call:\n{listed}")


class Route(NamedTuple):
    """Where a call goes, and all calls like it."""

    problem: Problem
    backend: Backend
    run: Runner  #: the forward
    #: 0: no backend that would take the problem was passed over; else one was, for what it found out when it was
    #: called, and this is when it is asked again, inf for never.
    until: float = 0.0

    @property
    def lasts(self) -> bool:
        """Whether it may be remembered."""
        return self.until in (0.0, math.inf)


def route(call: Call, names: tuple[str, ...]) -> Route:
    """The problem that a call is and the backend that serves it. Raises BackendError with every refusal."""
    q, k, v = call[:3]
    strides = q.stride(), k.stride(), v.stride()
    optional = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in call[3:10]])
    # Everything that Problem.of and Backend.bind read; to make a Problem and ask the backends takes ten times as long.
    name = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, optional, call[11:], names)
    found = _routes.get(name)
    if found is None:
        problem = Problem.of(call)
        chosen, until = _select(problem, names)
        found = Route(problem, chosen, chosen.bind(problem, call), until)
        if found.lasts:
            _routes[name] = found
    return found


def serve(call: Call, names: tuple[str, ...], use: Callable[[Route], T]) -> T:
    """What `use` makes of a call's route. Where that backend turns out not to be able to, another one is used.

    Raises BackendError when nobody is left, but torch.OutOfMemoryError where that is for want of memory.
    """
    left, gave_back = names, False
    setback: Setback | None = None
    while True:
        try:
            found = route(call, left)
        except BackendError:
            if isinstance(setback, OutOfMemory):
                raise torch.OutOfMemoryError(str(setback)) from setback
            if setback is not None:
                raise _nobody(reasons(Problem.of(call), names)) from setback
            raise
        if setback is not None:  # the shortened list does not show who was passed over
            found = found._replace(until=time.monotonic())
        name = found.backend.name
        try:
            return use(found)
        except Exception as error:
            failure = failure_of(error, call.q.device)
            if failure is None:
                raise
        if isinstance(failure, OutOfMemory) and not gave_back and give_back(call.q.device):
            gave_back = True
            continue
        refuse(name, found.problem, failure)
        if isinstance(failure, Setback):
            setback, left = failure, tuple(other for other in left if other != name)


def gives_up(name: str, problem: Problem, error: Exception) -> bool:
    """True where an error says that the backend cannot serve the problem, ever or for now: it is passed over then."""
    failure = failure_of(error, torch.device(problem.device, max(problem.index, 0)))
    if failure is not None:
        refuse(name, problem, failure)
    return failure is not None


def refuse(name: str, problem: Problem, error: Refusal) -> None:
    """Takes a backend's word, given when it was called, that it cannot serve a problem; says so once per reason."""
    why = str(error).split("\n")[0][:300]
    now, wait = time.monotonic(), math.inf
    with _lock:
        if isinstance(error, Setback):
            last = _refused.get((name, problem))
            again = last is not None and now < last.until + last.wait
            wait = min(2 * last.wait, LONGEST_WAIT) if last is not None and again else FIRST_WAIT
        _refused[name, problem] = _Late(why, now + wait, wait)
        _routes.clear()
        fast_path.clear()
    kind = re.sub(r"\d+", "#", f"{name}: {why}")
    if wait < math.inf:
        warn_once(
            f"fastattn: {name} could not serve a call ({why}); another backend serves calls like it until {name} is "
            "tried again, in a few seconds. Out of GPU memory: leave more of it free.",
            kind,
        )
    else:
        warn_once(
            f"fastattn: {name} refused a call that it should serve ({why}); another backend serves it from now on. "
            "`fastattn doctor` says whether this machine's versions are the cause.",
            kind,
        )


def count(name: str) -> None:
    """Counts a call served, for `stats()`."""
    with _lock:
        _calls[name] += 1


def stats() -> dict[str, Any]:
    """What has happened in this process: calls served by each backend, and the cuDNN plans' counters.

    Returns a dict: "calls" maps backend names to forward calls served and "<name>.backward" to backward calls;
    "plans" holds the counters of the cuDNN plan cache (builds, disk loads, hits, evictions, milliseconds);
    "kept" says what is remembered of kinds of calls, by what it is: "entries", and the "bytes" of device memory in
    them. All of it is bounded, and `clear_plans` forgets all of it.
    """
    from ..backends.cudnn import plan_cache as plans

    with _lock:
        calls = dict(_calls)
    return {"calls": calls, "plans": plans.stats(), "kept": memo.holdings()}


def _warn_slow(refusals: dict[str, list[str]]) -> None:
    text = "; ".join(f"{name}: {', '.join(why)}" for name, why in refusals.items())
    warn_once(
        f"fastattn: a CUDA call runs on the exact but slow reference ({text or 'it was asked for'}). "
        "Run `fastattn doctor` to see what this machine lacks, and fastattn.explain(...) with the call's arguments "
        "to see what would have to change in the call.",
        kind=re.sub(r"\d+", "#", text),  # the same reason for other shapes is the same reason
    )
