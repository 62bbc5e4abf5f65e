"""What a Gluon kernel is launched with: its arguments as the driver wants them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, Protocol

from ..cuda_driver import MAP_WORDS, BoundLaunch, Function, TensorMap, TensorMaps, make_current

#: Of the maps of a launch's tensors: the word of `Room.maps` that is the address of the first one, the second one, ...
FIRST, SECOND, THIRD, FOURTH = range(0, 4 * MAP_WORDS, MAP_WORDS)
_UNUSED = 2  #: arguments that Triton adds to each kernel: scratch memory, of which ours have none


class Mapped(Protocol):
    """What tensors have in common that share a map but for its address: see `tensors.Layout`."""

    def map(self) -> TensorMap: ...


class Arguments:
    """Of all launches of one kernel for calls of one kind.

    The kernel takes tensor maps, pointers, integers, floats, in this order. A map is followed by its tensor's shape and
    strides, which no kernel of ours reads.
    """

    __slots__ = ("_floats", "_present", "_ranks", "integers")

    def __init__(self, ranks: Sequence[int], present: Sequence[bool], integers: tuple[int, ...], floats: int) -> None:
        """ranks: of the tensors that have maps. present: which of the pointers the kernel has. floats: how many."""
        self._ranks, self._present, self.integers, self._floats = ranks, present, integers, floats

    def room(
        self,
        function: Function,
        programs: int,
        device: int,
        layouts: Sequence[Mapped],
        uses: Sequence[int] | None = None,
    ) -> Room:
        """For one thread's launches of so many programs. uses: which of the layouts each tensor has; default: its own.
        The device must be the current one."""
        make_current(device)
        places, numbers, pointers = self.make()
        tensors = TensorMaps([x.map() for x in layouts])  # a thread without a context could not make one
        at = 0
        for rank, i in zip(self._ranks, range(len(layouts)) if uses is None else uses, strict=True):
            places[at] = tensors.addresses[i]
            at += 1 + 2 * rank
        pack = struct.Struct(f"{len(self.integers)}i")
        pack.pack_into(numbers, 0, *self.integers)
        launch = BoundLaunch(function, (programs, 1, 1), device, places, (numbers, pointers, tensors))
        return Room(launch, tensors.words, pointers, numbers, pack.size, self._floats)

    def make(self) -> tuple[Any, Any, Any]:
        """The array of addresses without those of maps, and the memory of numbers and of pointers it points to."""
        numbers = ctypes.create_string_buffer(4 * (len(self.integers) + self._floats))
        pointers = (ctypes.c_uint64 * (len(self._present) + 1))()
        unused = ctypes.addressof(pointers) + 8 * len(self._present)  # zeros, for what is not read
        where = []
        for rank in self._ranks:
            where += [0] + 2 * rank * [unused]
        where += [ctypes.addressof(pointers) + 8 * i for i, present in enumerate(self._present) if present]
        where += [ctypes.addressof(numbers) + 4 * i for i in range(len(self.integers) + self._floats)]
        where += _UNUSED * [unused]
        return (ctypes.c_void_p * len(where))(*where), numbers, pointers


class Room:
    """Launches of one kernel by one thread, and the memory of their arguments.

    maps: where the addresses of tensors with maps are written, `FIRST` and so on: see `TensorMaps.words`. pointers:
    `pointers[i]` is the i-th pointer, those included that the kernel does not have. scale: for its user, of the floats
    that were put last.
    """

    __slots__ = ("_floats_at", "_numbers", "_pack", "launch", "maps", "pointers", "scale")

    def __init__(
        self, launch: BoundLaunch, maps: Any, pointers: Any, numbers: Any, floats_at: int, floats: int
    ) -> None:
        self.launch, self.maps, self.pointers = launch, maps, pointers
        self._numbers, self._floats_at, self._pack = numbers, floats_at, struct.Struct(f"{floats}f")
        self.scale: float | None = None

    def put(self, *floats: float) -> None:
        """Writes the floats."""
        self._pack.pack_into(self._numbers, self._floats_at, *floats)
