"""What backends refused only when they were called, and when they are asked again."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ..backends.base import NotReady, Refusal, Setback
from ..call import Problem
from ..common.forks import after_fork, renew_lock
from ..common.notice import warn_once
from ..shape_cache import Reason, shape_cache

#: Seconds until a backend that had a setback is asked again, doubled each time that it has another one at once.
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0

_lock = threading.Lock()
after_fork(sys.modules[__name__], renew_lock)


class LateRefusal(NamedTuple):
    """A backend refused a problem when it was called."""

    why: str
    until: float  #: when it is asked again, by time.monotonic(); inf: never
    wait: float  #: seconds between
    coming: bool = False  #: it may end at any time: `Reason.BINARY_READY` says when
    make: Callable[[], object] | None = None  #: ends it at once, for a call that nobody else can serve


_refusals = shape_cache.section("refusals", 1 << 12)  #: `LateRefusal`s by name and problem
#: Those for want of a binary.
_waiting = shape_cache.section("refusals", 1 << 12, dropped_for=[Reason.BINARY_READY])


def late_refusal(name: str, problem: Problem) -> LateRefusal | None:
    """The refusal of a backend that still holds."""
    key = name, problem
    found: LateRefusal | None = _refusals.get(key) or _waiting.get(key)
    return found if found is not None and time.monotonic() < found.until else None


def record(name: str, problem: Problem, error: Refusal) -> None:
    """Takes a backend's word, given when it was called, that it cannot serve a problem; warns once per reason, but for
    a binary that is not ready yet."""
    why = str(error).split("\n")[0][:300]
    if isinstance(error, NotReady):
        _waiting[name, problem] = LateRefusal(why, error.until, math.inf, error.coming, error.make)
        if shape_cache.drops(Reason.BINARY_READY) != error.seen:  # it may have been dropped before it was there
            _waiting.pop((name, problem), None)
        shape_cache.invalidate(Reason.BACKEND_REFUSED)
        return
    now, wait = time.monotonic(), math.inf
    with _lock:
        if isinstance(error, Setback):
            last: LateRefusal | None = _refusals.get((name, problem))
            again = last is not None and now < last.until + last.wait
            wait = min(2 * last.wait, LONGEST_WAIT) if last is not None and again else FIRST_WAIT
        _refusals[name, problem] = LateRefusal(why, now + wait, wait)
        shape_cache.invalidate(Reason.BACKEND_REFUSED)
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
