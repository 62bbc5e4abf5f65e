"""Memory that a kernel needs while it runs, and nobody after: kept from launch to launch where that is safe."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from .. import shape_cache as memo
from .._compat import torch as torch_internals
from ..dispatch import routing as dispatch

_KEPT = 1 << 22  #: bytes; larger pieces are allocated each time and given back: beside them an allocation is nothing


class _Pieces(dict[int, tuple[int, Tensor]]):
    """One thread's: by device index, the stream and its memory."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Local(threading.local):
    def __init__(self) -> None:
        self.pieces = _Pieces()
        _threads.add(self.pieces)


class _Scratch:
    """All threads' memory, for `memo`. What a thread is about to use it holds itself."""

    name = "scratch"

    def forget(self) -> None:
        for pieces in list(_threads):
            pieces.clear()

    def holds(self) -> tuple[int, int]:
        found = [x.nbytes for pieces in list(_threads) for _, x in list(pieces.values())]
        return len(found), sum(found)


_threads: weakref.WeakSet[_Pieces] = weakref.WeakSet()
_local = _Local()
_scratch = _Scratch()
memo.register(_scratch)


def may_keep() -> bool:
    """False where what is allocated may be a CUDA graph's: it dies with the graph, or lives as long as the graph does.

    Inside an operator too: torch.compile warms its graphs up in their own pool before it captures them.
    """
    return not dispatch.opaque.get() and not torch.cuda.is_current_stream_capturing()


def scratch(device: torch.device, size: int) -> Tensor:
    """At least `size` bytes, uninitialised, uint8, for what this thread launches next on the current stream.

    Launches of one thread on one stream run one after another, so they can share the memory.
    """
    if size > _KEPT or device.type != "cuda" or not may_keep():
        return torch.empty(size, dtype=torch.uint8, device=device)
    kept = _local.pieces
    stream = torch_internals.raw_stream(device.index)
    found = kept.get(device.index)
    if found is None or found[0] != stream or found[1].shape[0] < size:
        fresh = torch.empty(max(1 << 16, 1 << (size - 1).bit_length()), dtype=torch.uint8, device=device)
        found = kept[device.index] = stream, fresh
    return found[1]
