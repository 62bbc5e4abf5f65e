"""What a Gluon kernel is launched with: its arguments as the driver wants them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..cuda_driver import BoundLaunch, Function, make_current

TENSOR = 9  #: arguments that a description of a tensor [B, H, S, D] is: itself, and what is not read
_UNUSED = 2  #: arguments that Triton adds to each kernel: scratch memory, of which ours have none


class Arguments:
    """Of all launches of one kernel for calls of one kind.

    The kernel takes descriptions of tensors, pointers, integers, floats, in this order. A description is followed by
    its tensor's shape and strides, which no kernel of ours reads.
    """

    __slots__ = ("_floats", "_present", "_ranks", "integers")

    def __init__(self, ranks: Sequence[int], present: Sequence[bool], integers: tuple[int, ...], floats: int) -> None:
        """ranks: of the tensors that are described. present: which of the pointers the kernel has. floats: how many."""
        self._ranks, self._present, self.integers, self._floats = ranks, present, integers, floats

    def room(self, function: Function, programs: int, device: int) -> Room:
        """For one thread's launches of so many programs. The device must be the current one."""
        make_current(device)
        places, numbers, pointers = self.make()
        pack = struct.Struct(f"{len(self.integers)}i")
        pack.pack_into(numbers, 0, *self.integers)
        steps = [1 + 2 * rank for rank in self._ranks]
        launch = BoundLaunch(function, (programs, 1, 1), device, places, (numbers, pointers))
        return Room(launch, tuple(accumulate(steps, initial=0))[:-1], pointers, numbers, pack.size, self._floats)

    def make(self) -> tuple[Any, Any, Any]:
        """The array of addresses, and the memory of the numbers and of the pointers that it holds addresses of."""
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

    places: where the driver finds each argument; `places[described[i]]` is the address of the i-th description.
    pointers: `pointers[i]` is the i-th pointer, those included that the kernel does not have. scale: for its user, of
    the floats that were put last.
    """

    __slots__ = ("_floats_at", "_numbers", "_pack", "described", "launch", "places", "pointers", "scale")

    def __init__(
        self, launch: BoundLaunch, described: tuple[int, ...], pointers: Any, numbers: Any, floats_at: int, floats: int
    ) -> None:
        self.launch, self.places, self.described, self.pointers = launch, launch.places, described, pointers
        self._numbers, self._floats_at, self._pack = numbers, floats_at, struct.Struct(f"{floats}f")
        self.scale: float | None = None

    def put(self, *floats: float) -> None:
        """Writes the floats."""
        self._pack.pack_into(self._numbers, self._floats_at, *floats)
