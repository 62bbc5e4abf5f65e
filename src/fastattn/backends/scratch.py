"""Memory that a kernel needs while it runs, and nobody after: kept from launch to launch where that is safe."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._compat import torch as torch_internals

_KEPT = 1 << 22  #: bytes; larger pieces are allocated each time and given back: beside them an allocation is nothing
_local = threading.local()


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
    kept: dict[Any, tuple[int, Tensor]] = _local.__dict__
    stream = torch_internals.raw_stream(device.index)
    found = kept.get(device.index)
    if found is None or found[0] != stream or found[1].shape[0] < size:
        fresh = torch.empty(max(1 << 16, 1 << (size - 1).bit_length()), dtype=torch.uint8, device=device)
        found = kept[device.index] = stream, fresh
    return found[1]
