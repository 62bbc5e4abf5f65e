"""What a Gluon kernel is launched with: its arguments as the driver wants them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from ...._compat import torch as torch_internals
from ..cuda_driver import Description, Function, make_current

_UNUSED = 2  #: arguments that Triton adds to each kernel: scratch memory, of which ours have none


class Arguments:
    """Of all launches of one kernel for calls of one kind: an array of addresses, one array a thread.

    The kernel takes descriptions of tensors, pointers, integers, floats, in this order. A description is followed by
    its tensor's shape and strides, which no kernel of ours reads.
    """

    __slots__ = ("_floats", "_local", "_numbers", "_present", "_ranks", "integers")

    def __init__(self, ranks: Sequence[int], present: Sequence[bool], integers: tuple[int, ...], floats: int) -> None:
        """ranks: of the tensors that are described. present: which of the pointers the kernel has. floats: how many."""
        self._ranks, self._present, self.integers, self._floats = ranks, present, integers, floats
        self._numbers = struct.Struct(f"{len(integers)}i{floats}f")
        self._local = threading.local()

    def launch(
        self,
        function: Function,
        programs: int,
        device: int,
        described: Sequence[Description],
        addresses: Sequence[int],
        *floats: float,
    ) -> None:
        """addresses: of all pointers, those included that the kernel does not have."""
        kept = self._local.__dict__
        if not kept:
            make_current(device)
            kept.update(zip(("places", "numbers", "pointers"), self.make(), strict=True))
        places, pointers = kept["places"], kept["pointers"]
        at = 0
        for rank, description in zip(self._ranks, described, strict=True):
            places[at] = description.address
            at += 1 + 2 * rank
        self._numbers.pack_into(kept["numbers"], 0, *self.integers, *floats)
        pointers[: len(addresses)] = addresses
        function.launch(programs, device, torch_internals.raw_stream(device), places)

    def make(self) -> tuple[Any, Any, Any]:
        """The array, and the memory of the numbers and of the pointers that it holds addresses of."""
        numbers = ctypes.create_string_buffer(self._numbers.size)
        pointers = (ctypes.c_uint64 * (len(self._present) + 1))()
        unused = ctypes.addressof(pointers) + 8 * len(self._present)  # zeros, for what is not read
        where = []
        for rank in self._ranks:
            where += [0] + 2 * rank * [unused]
        where += [ctypes.addressof(pointers) + 8 * i for i, present in enumerate(self._present) if present]
        where += [ctypes.addressof(numbers) + 4 * i for i in range(len(self.integers) + self._floats)]
        where += _UNUSED * [unused]
        return (ctypes.c_void_p * len(where))(*where), numbers, pointers
