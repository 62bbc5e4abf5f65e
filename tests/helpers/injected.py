"""Errors at the n-th point of a call at which Python could be interrupted, or at which memory could run out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import fastattn

HOME = str(Path(fastattn.__file__).parent)
#: Of a tensor's methods and torch's functions those that take no memory.
FREE = {
    "stride", "size", "dim", "numel", "data_ptr", "is_contiguous", "element_size", "is_neg", "is_floating_point",
    "detach", "requires_grad_", "expand", "view", "transpose", "narrow", "select", "unflatten", "storage_offset",
    "is_complex", "get_device", "ndimension", "is_inference", "is_conj", "unbind", "split", "unfold",
}  # fmt: skip


def may_interrupt(frame: FrameType, event: str, argument: Any) -> bool:
    """Where CPython looks for signals: as a function begins, and after a call of one that is not Python's.

    (Not between the end of a `with` block and the release of its lock: there it does not look.)
    """
    if not frame.f_code.co_filename.startswith(HOME):
        return False
    if event == "c_return":
        # One instruction separates `token = variable.set(...)` from the `try` that would undo it.
        return getattr(argument, "__name__", "") != "set"
    return event == "call" and frame.f_code.co_name != "<genexpr>"  # which begins again to be closed


def may_run_out(frame: FrameType, event: str, argument: Any) -> bool:
    """A call that may ask torch for memory, made by fastattn."""
    if event != "c_call" or not frame.f_code.co_filename.startswith(HOME):
        return False
    owner = getattr(argument, "__self__", None)
    # (A tensor is looked at by its type alone: bool() of it would be a call as well.)
    is_torchs = isinstance(owner, Tensor) or "torch" in (getattr(argument, "__module__", None) or "").split(".")
    is_torchs = is_torchs or getattr(owner, "__name__", "").startswith("torch")
    return is_torchs and getattr(argument, "__name__", "") not in FREE


def points(call: Callable[[], Any], counts: Callable[[FrameType, str, Any], bool]) -> int:
    """At how many points of a call an error may come."""
    found = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal found
        found += counts(frame, event, argument)

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def broken(
    call: Callable[[], Any], counts: Callable[[FrameType, str, Any], bool], at: int, error: BaseException
) -> bool:
    """Makes the call, with an error at its point number `at`. True if that is what came of it."""
    left = at

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if counts(frame, event, argument):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise error

    sys.setprofile(count)
    try:
        call()
    except type(error):
        return True
    finally:
        sys.setprofile(None)
    return False


def each_point(total: int, most: int) -> Iterator[int]:
    """All points of so many, or evenly spread ones among them, `most` at the most."""
    yield from range(0, total, max(1, -(-total // most)))


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("no memory: injected")
