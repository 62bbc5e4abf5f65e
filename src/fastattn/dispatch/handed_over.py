"""Calls of the drop-in that were handed to torch's own function: how many, and why."""

from __future__ import annotations

import sys
import threading
from collections import Counter

from ..common.forks import after_fork, renew_lock

_handed: Counter[str] = Counter()
_lock = threading.Lock()
after_fork(sys.modules[__name__], renew_lock)


def count(reason: str) -> None:
    """Counts a call that was handed over."""
    with _lock:
        _handed[reason] += 1


def handed_over() -> dict[str, int]:
    """Calls handed to torch in this process, by reason."""
    with _lock:
        return dict(_handed)
