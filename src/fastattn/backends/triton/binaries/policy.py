"""When a binary is compiled, and whether calls wait for it.

FASTATTN_COMPILE=background     nobody waits; but as with "wait" while a CUDA graph is captured, which keeps the
                                kernel that it captures, and under torch's deterministic algorithms: which kernel
                                serves a call, and so how it rounds, must not depend on when one was compiled
FASTATTN_COMPILE=wait           a call waits for its kernel: tests and measurements do
FASTATTN_COMPILE=off            nothing is compiled; what is on disk is used
FASTATTN_UNTESTED_TRITON=1      a version of Triton that was not tested may compile
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ...._compat.triton_compiler import compiler
from ....config import choice, is_on
from ..launcher import INSTALL

MODES = ("background", "wait", "off")

_waits: ContextVar[bool] = ContextVar("fastattn_waits", default=False)


def mode() -> str:
    """FASTATTN_COMPILE, as it is to be taken here and now. ValueError: it is set to something else."""
    found = choice("FASTATTN_COMPILE", MODES, MODES[0])
    if found != "background":
        return found
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return "wait" if captured or torch.are_deterministic_algorithms_enabled() or _waits.get() else found


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block calls of this thread or task wait for their kernels: it makes ready for others."""
    token = _waits.set(True)
    try:
        yield
    finally:
        _waits.reset(token)


def hindrance() -> str:
    """Why nothing is compiled here, "" where it is."""
    if mode() == "off":
        return "FASTATTN_COMPILE=off"
    found = compiler()
    if found is None:
        return INSTALL
    if found.untested and not is_on("FASTATTN_UNTESTED_TRITON", False):
        return f"{found.untested}; FASTATTN_UNTESTED_TRITON=1 lets it compile"
    return ""
