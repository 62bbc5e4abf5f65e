"""What a forked child creates anew: locks that a thread of the parent, which the child does not have, may hold."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_wishes: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def after_fork(owner: Any, renew: Callable[[Any], None]) -> None:
    """Registers `renew(owner)` to be called in every forked child, for as long as the owner lives."""
    _wishes[owner] = renew


def renew_lock(owner: Any) -> None:
    """Replaces the `_lock` of a module or an object: a callback for `after_fork`."""
    owner._lock = threading.Lock()


def _renew_all() -> None:
    for owner, renew in list(_wishes.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
