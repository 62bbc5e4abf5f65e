"""What the main kernel of the Hopper backward is launched with."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

from ...._compat import torch as torch_internals
from ..cuda_driver import Description, Function, make_current
from .binary import INTERVALS, Flags

_NUMBERS = struct.Struct("13i3f")


class Arguments:
    """The main kernel's arguments as the driver wants them: an array of addresses, one array a thread.

    A description is followed by its tensor's shape and strides, which no kernel of ours reads; the last two arguments
    are scratch memory of Triton's, of which the kernel has none.
    """

    __slots__ = ("_integers", "_local", "_present", "_ranks")

    def __init__(self, flags: Flags, integers: tuple[int, ...]) -> None:
        self._integers = integers
        bounds = flags.mask == INTERVALS
        self._ranks = (4, 4, 4, 4, 1, 4, 4, *((4, 4) if bounds else ()))
        self._present = (True, flags.split, bounds, bounds)
        self._local = threading.local()

    def launch(
        self,
        function: Function,
        programs: int,
        device: int,
        described: list[Description],
        addresses: list[int],
        inner: float,
        scale: float,
        factor: float,
    ) -> None:
        kept = self._local.__dict__
        if not kept:
            make_current(device)
            kept.update(zip(("places", "numbers", "pointers"), self._make(), strict=True))
        places, numbers, pointers = kept["places"], kept["numbers"], kept["pointers"]
        at = 0
        for rank, one in zip(self._ranks, described, strict=True):
            places[at] = one.address
            at += 1 + 2 * rank
        _NUMBERS.pack_into(numbers, 0, *self._integers, inner, scale, factor)
        pointers[: len(addresses)] = addresses
        function.launch(programs, device, torch_internals.raw_stream(device), places)

    def _make(self) -> tuple[Any, Any, Any]:
        numbers = ctypes.create_string_buffer(_NUMBERS.size)
        pointers = (ctypes.c_uint64 * 5)()
        unused = ctypes.addressof(pointers) + 8 * 4  # zeros, for what is not read
        where = []
        for rank in self._ranks:
            where += [0] + 2 * rank * [unused]
        where += [ctypes.addressof(pointers) + 8 * i for i, present in enumerate(self._present) if present]
        where += [ctypes.addressof(numbers) + 4 * i for i in range(16)]
        where += 2 * [unused]
        return (ctypes.c_void_p * len(where))(*where), numbers, pointers
