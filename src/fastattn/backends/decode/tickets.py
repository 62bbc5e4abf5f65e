"""Counters by which the last program of a tile knows that it is the last.

Each program of a split tile draws a ticket when its part is written; who draws the last one puts the parts together and
sets the counter back to 0. So counters need no clearing, but launches that may run at the same time must not share any.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ... import dispatch
from ...memo import Memo

MOST = 4096  #: counters of one launch
_CAPTURED = 1 << 18  #: counters for launches in CUDA graphs, of each device: 1 MiB

_lock = threading.Lock()
#: By device and stream: launches on one stream run one after another.
_by_stream: Memo[tuple[int, int], Tensor] = Memo(256)
_slabs: dict[int, tuple[Tensor, int]] = {}  #: by device: memory, and how much of it graphs hold


def tickets(device: torch.device, count: int) -> Tensor | None:
    """At least `count` int32 zeros for a launch on the current stream, or None where there are none to be had.

    A launch that a CUDA graph captures gets counters of its own for good: graphs may be replayed side by side.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if count > MOST:
        return None
    index = device.index
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            slab, held = _slabs.get(index, (None, 0))
            if slab is None or held + count > _CAPTURED:
                return None
            _slabs[index] = slab, held + count
            return slab[held : held + count]
    name = index, torch._C._cuda_getCurrentRawStream(index)
    found = _by_stream.get(name)
    if found is None and not dispatch.opaque.get():  # else the memory may be a graph's that is about to be captured
        found = _by_stream[name] = torch.zeros(MOST, dtype=torch.int32, device=device)
        with _lock:
            if index not in _slabs:
                slab = torch.zeros(_CAPTURED, dtype=torch.int32, device=device)
                torch.cuda.current_stream(device).synchronize()  # once: graphs may be replayed on any stream
                _slabs[index] = slab, 0
    return found
