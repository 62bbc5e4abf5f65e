"""Warnings that are given once a process."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path

import torch

from .forks import after_fork, renew_lock

_HERE = str(Path(__file__).parents[1])
_given: set[str] = set()
_lock = threading.Lock()


after_fork(sys.modules[__name__], renew_lock)


class FastattnWarning(UserWarning):
    """A call works, but slower than it could: the message names the reason and the remedy."""


def warn_once(text: str, kind: str | None = None) -> None:
    """Issues a FastattnWarning at the line that called fastattn, once per `kind` (default: per text) and process.

    Does nothing while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return
    with _lock:
        if (kind or text) in _given:
            return
        _given.add(kind or text)
    warnings.warn(text, FastattnWarning, stacklevel=_outside())


def _outside() -> int:
    """The stack level, for `warnings.warn` in the caller of this, of the innermost frame that is not fastattn's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    return level
