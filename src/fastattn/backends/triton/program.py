"""The launches of a bound kernel as data, for `dispatch/native`, which runs them without Python.

A kernel's launches differ from call to call in addresses alone, as long as calls are of one kind and of one scale. So
a program names the tensors that a call allocates, says where each address belongs in the memory of arguments, and lists
the launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ...call import CALL, Call, Gradients
from ..layout import Fresh
from .cuda_driver import BoundLaunch

#: The names of `Gradients` among `SOURCES`.
GRADIENTS = tuple([f"grad_{name}" for name in Gradients._fields])
#: What has an address: the tensors of a call, in order; what a forward makes; what a backward gets and makes; its
#: working memory. (`Source` in attention.cpp.)
SOURCES = (*CALL.tensor_names, "out", "lse", "grad_out", *GRADIENTS, "memory")
#: As `binaries.launcher.Launch`, but for its tensors: None, where the kernel has none, and `Named` or a tensor.
NamedLaunch = tuple[Any, Sequence[Any], Any]


class Room(Protocol):
    """A plain kernel's launch and the memory of its arguments: see `binaries.launcher.Room`."""

    values: Any
    launch: BoundLaunch


@dataclass(frozen=True, slots=True)
class Named:
    """Stands for a tensor whose address is to be written: its name (of a program's tensors one of `SOURCES`), and bytes
    from there on."""

    source: str
    offset: int = 0

    def __getitem__(self, part: slice) -> Named:
        """Of bytes."""
        return Named(self.source, self.offset + (part.start or 0))

    def view(self, dtype: torch.dtype) -> Named:
        return self

    def data_ptr(self) -> int:
        """It begins where 16-byte pieces do."""
        return 0


def named(call: Call) -> Call:
    """The call with `Named` in the place of each tensor that it has."""
    present = [name for name, x in zip(CALL.tensor_names, CALL.tensors(call), strict=True) if x is not None]
    return call._replace(**{name: Named(name) for name in present})  # type: ignore[arg-type]


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

    @classmethod
    def of_forward(cls, out: Fresh, lse: Fresh | None, memory: int = 0, aligned: Iterable[str] = ()) -> Program:
        """One that makes an output, and a log-sum-exp where calls have one."""
        return cls({"out": out, **({} if lse is None else {"lse": lse})}, memory, aligned)

    @classmethod
    def of_backward(cls, grads: Iterable[Fresh | None], memory: int = 0, aligned: Iterable[str] = ()) -> Program:
        """One that makes gradients. grads: in the order of `Gradients`, the last ones may be missing."""
        return cls({name: make for name, make in zip(GRADIENTS, grads) if make is not None}, memory, aligned)

    def own(self, source: str) -> Named | None:
        """Stands for what it makes under that name, or for its "memory"; None where there is none."""
        return Named(source) if source in self.made or (source == "memory" and self.memory) else None

    def write(self, array: Any, i: int, source: str, offset: int = 0) -> None:
        """`array[i]`, 8 bytes, is to be an address. Raises TypeError where that is not all there is to it."""
        # (`TensorMaps.words` is no array where only the driver can change an address.)
        self.writes.append((ctypes.addressof(array) + 8 * i, SOURCES.index(source), offset))

    def add_all(self, rooms: Sequence[Room], launches: Sequence[NamedLaunch], aligned: bool = False) -> None:
        """Launches of plain kernels, in order. launches: the same, with what stands for their tensors; a tensor itself
        is one that stays where it is. aligned: where a kernel reads tensors of the call, these must begin where 16-byte
        pieces do."""
        for room, (_, pointers, _) in zip(rooms, launches, strict=True):
            for i, x in enumerate([x for x in pointers if x is not None]):
                if not isinstance(x, Named):
                    room.values[i] = x.data_ptr()
                    continue
                self.write(room.values, i, x.source, x.offset)
                if aligned and x.source in CALL.tensor_names:
                    self.aligned.add(x.source)
            self.launches.append(room.launch)
