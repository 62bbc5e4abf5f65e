"""Which backend serves a call, and why not the others.

The rule is one list, fastest first; the first backend without a reason to refuse serves the call. `FASTATTN_BACKENDS`
(a comma-separated list), `FASTATTN_CUDNN=0` and `use_backend` shorten or reorder the list.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

from ._compat.torch import constant_when_traced
from .backends.base import Backend, Runner
from .forks import after_fork, renew_lock
from .memo import Memo
from .notice import warn_once
from .problem import Call, Problem
from .switches import is_on, setting

NAMES = ("decode", "cudnn", "torch", "reference")  #: all backends, in the order in which they are asked

_chosen: ContextVar[tuple[str, ...] | None] = ContextVar("fastattn_backends", default=None)
#: True inside torch's operators, where the memory that is allocated may be a captured graph's.
opaque: ContextVar[bool] = ContextVar("fastattn_opaque", default=False)
_calls: Counter[str] = Counter()
_refused: dict[tuple[str, Problem], str] = {}
_lock = threading.Lock()


after_fork(sys.modules[__name__], renew_lock)
#: What `api.py` remembers of whole calls; here because it has to go when a route does.
fast_path: Memo[Any, Any] = Memo(1 << 12)
_routes: Memo[Any, Route] = Memo(1 << 13)


class BackendError(ValueError):
    """No allowed backend can serve a call; the text lists every refusal."""


@cache
def backend(name: str) -> Backend:
    """The backend of that name; its module is imported on first use."""
    if name == "decode":
        from .backends.decode import DecodeBackend

        return DecodeBackend()
    if name == "cudnn":
        from .backends.cudnn import CudnnBackend

        return CudnnBackend()
    if name == "torch":
        from .backends.torch_sdpa import TorchBackend

        return TorchBackend()
    from .backends.exact import ReferenceBackend

    return ReferenceBackend()


def check_names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError, naming the argument, unless all are backends."""
    unknown = [name for name in names if not isinstance(name, str) or name not in NAMES]
    if unknown or not names:
        found = ", ".join(str(name) for name in unknown) or "none"
        raise ValueError(f"{argument}: expected one or more of {', '.join(NAMES)}, got {found}")
    return tuple(names)


@constant_when_traced
def allowed() -> tuple[str, ...]:
    """The backends that may serve a call here and now, in order. Under torch.compile: when the graph was traced."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    listed = setting("FASTATTN_BACKENDS")
    names = NAMES if not listed else check_names([n.strip() for n in listed.split(",")], "FASTATTN_BACKENDS")
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


def _reasons(name: str, problem: Problem) -> list[str]:
    """What a backend says, and what it found out when it was called (`refuse`)."""
    late = _refused.get((name, problem))
    return [*backend(name).reasons(problem), *([late] if late else [])]


def select(problem: Problem, names: Sequence[str]) -> Backend:
    """The first backend of the list that can serve the problem. Raises BackendError with every refusal."""
    refusals: dict[str, list[str]] = {}
    for name in names:
        why = _reasons(name, problem)
        if not why:
            if name == "reference" and problem.device == "cuda" and not problem.empty:
                _warn_slow(refusals)
            return backend(name)
        refusals[name] = why
    if not names:
        raise BackendError("no backend is allowed: FASTATTN_BACKENDS names cudnn alone and FASTATTN_CUDNN=0 forbids it")
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in refusals.items())
    raise BackendError(f"no allowed backend can serve this call:\n{listed}")


class Route(NamedTuple):
    """Where a call goes, and all calls like it."""

    problem: Problem
    backend: Backend
    run: Runner  #: the forward


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
        chosen = select(problem, names)
        found = _routes[name] = Route(problem, chosen, chosen.bind(problem, call))
    return found


def refuse(name: str, problem: Problem, error: Exception) -> None:
    """Takes a backend's word, given when it was called, that it cannot serve a problem; says so once per reason."""
    why = str(error).split("\n")[0][:300]
    with _lock:
        _refused[name, problem] = why
        _routes.clear()
        fast_path.clear()
    warn_once(
        f"fastattn: {name} refused a call that it should serve ({why}); another backend serves it from now on. "
        "`fastattn doctor` says whether this machine's versions are the cause."
    )


def count(name: str) -> None:
    """Counts a call served, for `stats()`."""
    with _lock:
        _calls[name] += 1


def stats() -> dict[str, Any]:
    """What has happened in this process: calls served by each backend, and the cuDNN plans' counters.

    Returns a dict: "calls" maps backend names to forward calls served and "<name>.backward" to backward calls;
    "plans" holds the counters of the cuDNN plan cache (builds, disk loads, hits, evictions, milliseconds).
    """
    from .backends.cudnn import plans

    with _lock:
        calls = dict(_calls)
    return {"calls": calls, "plans": plans.stats()}


def _warn_slow(refusals: dict[str, list[str]]) -> None:
    text = "; ".join(f"{name}: {', '.join(why)}" for name, why in refusals.items())
    warn_once(
        f"fastattn: a CUDA call runs on the exact but slow reference ({text or 'it was asked for'}). "
        "Run `fastattn doctor` to see what this machine lacks, and fastattn.explain(...) with the call's arguments "
        "to see what would have to change in the call.",
        kind=re.sub(r"\d+", "#", text),  # the same reason for other shapes is the same reason
    )
