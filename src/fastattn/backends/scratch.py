"""Memory that a kernel needs while it runs, and nobody after: reused from launch to launch where that is safe."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar

import torch
from torch import Tensor

from .._compat import torch as torch_internals
from ..shape_cache import Reason, Size, shape_cache

_KEPT = 1 << 22  #: bytes; larger pieces are allocated each time and given back: beside them an allocation is nothing

_ALIGNMENT = 256  #: bytes, of each part of a piece
_COUNTERS = 4096  #: of a stream, at the least
_STREAMS = 16  #: whose counters a thread keeps

_inside_operator: ContextVar[bool] = ContextVar("fastattn_inside_operator", default=False)


class _Pieces(dict[int, tuple[int, Tensor]]):
    """One thread's: by device index, the stream and its memory. counters: by device index and stream."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self) -> None:
        self.counters: dict[tuple[int, int], Tensor] = {}

    def clear(self) -> None:
        super().clear()
        self.counters.clear()


class _Local(threading.local):
    def __init__(self) -> None:
        self.pieces = _Pieces()
        _threads.add(self.pieces)


class _Scratch:
    """The memory of all threads, as a holder of `shape_cache`. A thread holds itself what it is about to use."""

    name = "scratch"
    dropped_for: frozenset[Reason] = frozenset()

    def clear(self) -> None:
        for pieces in list(_threads):
            pieces.clear()

    def size(self) -> Size:
        threads = list(_threads)
        found = [x.nbytes for pieces in threads for _, x in list(pieces.values())]
        found += [x.nbytes for pieces in threads for x in list(pieces.counters.values())]
        return Size(len(found), sum(found))


_threads: weakref.WeakSet[_Pieces] = weakref.WeakSet()
_local = _Local()
_scratch = _Scratch()
shape_cache.register(_scratch)


class inside_operator:
    """Marks the implementation of an operator of torch: what it allocates may belong to a graph that a compiler
    captures, so nothing that is allocated within the block may be kept.

    (A generator with `contextmanager` would take 1 us more, in every call of a compiled graph.)
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _inside_operator.set(True)

    def __exit__(self, *error: object) -> None:
        _inside_operator.reset(self._token)


def may_keep(stream: int) -> bool:
    """False where memory that is allocated may be a CUDA graph's, which frees it or keeps it as the graph lives: in a
    capture, and inside an operator, whose graphs torch.compile warms up in their own pool before it captures them.

    stream: the address of the current one.
    """
    # The default stream, 0, is never captured: CUDA refuses to. Of another one torch asks the driver twice.
    return not _inside_operator.get() and not (stream and torch.cuda.is_current_stream_capturing())


def scratch(device: torch.device, size: int, stream: int | None = None) -> Tensor:
    """At least `size` bytes, uninitialised, uint8, for what this thread launches next on the current stream.

    stream: the address of that stream, where it is known.

    Launches of one thread on one stream run one after another, so they can share the memory. (So what is asked for next
    is the same memory: who needs two pieces at a time asks for one, see `Pieces`.)
    """
    if size > _KEPT or device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if stream is None:
        stream = torch_internals.raw_stream(device.index)
    if not may_keep(stream):
        return torch.empty(size, dtype=torch.uint8, device=device)
    return _piece(_local.pieces, device, size, stream)


def _piece(kept: _Pieces, device: torch.device, size: int, stream: int) -> Tensor:
    found = kept.get(device.index)
    if found is None or found[0] != stream or found[1].shape[0] < size:
        fresh = torch.empty(max(1 << 16, 1 << (size - 1).bit_length()), dtype=torch.uint8, device=device)
        found = kept[device.index] = stream, fresh
    return found[1]


def counted(device: torch.device, size: int, count: int, stream: int) -> tuple[Tensor, Tensor] | None:
    """Scratch memory, as `scratch`, and at least `count` int32 numbers that are 0, which a kernel counts with and
    leaves at 0. None where they may not be kept: to clear them would be another launch.

    stream: the address of the current one. A kernel that counts must run alone on the numbers. So each stream of each
    thread has its own, and a captured call gets none: graphs of one stream may be replayed side by side. (A stream that
    was destroyed, and another one at its address: what the first one was given has to be done by then, as for memory of
    torch's own allocator, which tells streams apart in the same way.)
    """
    interpreted = device.type != "cuda"
    if size > _KEPT or not may_keep(0 if interpreted else stream):
        return None
    if interpreted:
        return torch.empty(size, dtype=torch.uint8, device=device), torch.zeros(count, dtype=torch.int32, device=device)
    kept, key = _local.pieces, (device.index, stream)
    counters = kept.counters.get(key)
    if counters is None or counters.shape[0] < count:
        if len(kept.counters) >= _STREAMS:
            del kept.counters[next(iter(kept.counters))]  # the oldest ones
        counters = torch.zeros(max(_COUNTERS, count), dtype=torch.int32, device=device)
        kept.counters[key] = counters
    return _piece(kept, device, size, stream), counters


class Pieces:
    """What has to live side by side in one piece of scratch memory: where each of its parts lies."""

    __slots__ = ("at", "total")

    def __init__(self, sizes: dict[str, tuple[int, torch.dtype]], first: int = 0) -> None:
        """sizes: of each part its bytes and dtype; of 0 bytes there is none. first: bytes that others use before."""
        self.at: dict[str, tuple[int, int, torch.dtype]] = {}  #: first byte, one past the last, dtype
        end = _rounded(first)
        for name, (size, dtype) in sizes.items():
            if size:
                self.at[name] = end, end + size, dtype
                end += _rounded(size)
        self.total = end  #: bytes

    def cut(self, memory: Tensor) -> dict[str, Tensor]:
        """The parts by their names. memory: at least `total` bytes, uint8."""
        return {name: memory[start:end].view(dtype) for name, (start, end, dtype) in self.at.items()}


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
