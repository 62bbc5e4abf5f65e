"""The launches of a bound kernel as data, for `dispatch/native`, which runs them without Python.

A kernel's launches differ from call to call in addresses alone, as long as calls are of one kind and of one scale. So
a program names the tensors that a call allocates, says where each address belongs in the memory of arguments, and lists
the launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ...call import CALL, Gradients
from ..layout import Fresh
from .cuda_driver import BoundLaunch

#: What has an address: the tensors of a call, in order; what a forward makes; what a backward gets and makes; its
#: working memory. (`Source` in attention.cpp.)
SOURCES = (*CALL.tensor_names, "out", "lse", "grad_out", *[f"grad_{name}" for name in Gradients._fields], "memory")


class Room(Protocol):
    """A plain kernel's launch and the memory of its arguments: see `binaries.launcher.Room`."""

    values: Any
    launch: BoundLaunch


class Named:
    """Stands for a tensor whose address is to be written: a name in `SOURCES`, and bytes from there on."""

    __slots__ = ("offset", "source")

    def __init__(self, source: str, offset: int = 0) -> None:
        self.source, self.offset = source, offset

    def __getitem__(self, part: slice) -> Named:
        """Of bytes."""
        return Named(self.source, self.offset + (part.start or 0))

    def view(self, dtype: torch.dtype) -> Named:
        return self

    def data_ptr(self) -> int:
        """It begins where 16-byte pieces do."""
        return 0


class Program:
    """Of the forward or the backward of calls of one kind. Its launches have memory of their own for arguments.

    made: the tensors that a call allocates, by their names in `SOURCES`. memory: bytes of working memory. aligned: of
    the tensors that it is given, those that must begin where 16-byte pieces do. apart: the values must not begin where
    the keys do. counters: what a kernel counts with, of the thread and the stream that made them and of no
    captured graph (see `scratch.counted`).
    """

    __slots__ = ("aligned", "apart", "counters", "launches", "made", "memory", "writes")

    def __init__(self, made: dict[str, Fresh], memory: int = 0, aligned: Iterable[str] = ()) -> None:
        self.made, self.memory, self.aligned = made, memory, set(aligned)
        self.apart, self.counters = False, cast("Tensor | None", None)
        self.launches: list[BoundLaunch] = []
        #: The address of a word in the memory of arguments, a number in `SOURCES`, and bytes to add.
        self.writes: list[tuple[int, int, int]] = []

    def write(self, array: Any, i: int, source: str, offset: int = 0) -> None:
        """`array[i]`, 8 bytes, is to be an address. Raises TypeError where that is not all there is to it."""
        # (`TensorMaps.words` is no array where only the driver can change an address.)
        self.writes.append((ctypes.addressof(array) + 8 * i, SOURCES.index(source), offset))

    def add(self, room: Room, pointers: Sequence[Named | None]) -> None:
        """The launch of a plain kernel. pointers: its own; None: it has none there."""
        for i, x in enumerate([x for x in pointers if x is not None]):
            self.write(room.values, i, x.source, x.offset)
        self.launches.append(room.launch)
