"""Launching a plain Triton kernel by its binary: no launch waits for Triton's compiler, nor goes through its binder."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ..cuda_driver import BoundLaunch, Function, make_current
from ..launcher import Launcher
from . import store
from .flag_set import FlagSet
from .policy import mode
from .triton_kernel import ALIGNMENT, NamedKernel, TritonFlags, flags_of

_UNUSED = 2  #: arguments that Triton adds to each kernel: scratch memory, of which ours have none


#: What `launcher_of`'s results are launched with, at bind: tensors and floats.
Launch = tuple["BinaryLauncher | Launcher", Sequence[Tensor | None], tuple[float | None, ...]]


def launcher_of(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    capability: tuple[int, int],
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    aligned: int | None = None,
    **options: int,
) -> BinaryLauncher | Launcher:
    """Launches a kernel by its binary or, on the CPU, through Triton's interpreter.

    kernel: a `NamedKernel`, or Triton's own, which a module has that imports triton. aligned: see `BinaryLauncher`.
    """
    if device.type == "cpu":
        if isinstance(kernel, NamedKernel):
            kernel = kernel.load()
        return Launcher(kernel, grid, device, integers, constants, **options)
    return BinaryLauncher(kernel, grid, device, capability, integers, constants, aligned, **options)


def prepare(launches: Sequence[Launch]) -> None:
    """Finds the binaries of all launches of a kernel that is being bound. Those that are not there are compiled side by
    side. Raises what `Binaries.function` raises. Calls on the meta device stand for others: nothing is launched."""
    found = [(x, tensors, floats) for x, tensors, floats in launches if launches_binary(x)]
    for launcher, tensors, floats in found:
        launcher.ask(tensors, floats)
    for launcher, tensors, floats in found:
        launcher.prepare(tensors, floats)


def flag_sets(launches: Sequence[Launch]) -> list[FlagSet]:
    """The binaries that launches take, in order."""
    return [x.flags(tensors, floats) for x, tensors, floats in launches if isinstance(x, BinaryLauncher)]


def launches_binary(launcher: BinaryLauncher | Launcher) -> TypeGuard[BinaryLauncher]:
    """Whether it launches a binary, on a GPU."""
    return isinstance(launcher, BinaryLauncher) and launcher.launches


def rooms_of(launches: Sequence[Launch]) -> list[Room] | None:
    """For each launch `BinaryLauncher.room`; None where one is not of a binary on a GPU."""
    found = [(x, tensors, floats) for x, tensors, floats in launches if launches_binary(x)]
    return [x.room(tensors, floats) for x, tensors, floats in found] if len(found) == len(launches) else None


class BinaryLauncher:
    """A kernel with its grid, integers and constants, as `triton.launcher.Launcher`: all that is left to say of a
    launch is tensors and floats. From launch to launch these are None at the same places, and tensors of the same
    dtypes.

    The kernel takes tensors, integers, floats, constants, in this order, and declares every integer
    `do_not_specialize`. aligned: of so many tensors, the first ones, the compiler is told where their addresses are
    multiples of 16, of the others never; None: of all. options: num_warps and the like; with `launch_pdl` it may start
    while the kernel before it still runs.
    """

    __slots__ = (
        *("_capability", "_constants", "_device", "_functions", "_grid", "_integers", "_kernel", "_looked_at"),
        *("_options", "_overlaps", "_rooms", "_told"),
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        capability: tuple[int, int],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        aligned: int | None = None,
        **options: int,
    ) -> None:
        self._kernel = kernel
        self._told = aligned
        self._looked_at: int | None = None  #: addresses whose alignment picks the binary; None: not known yet, or all
        x, y, z = (*grid, 1, 1)[:3]
        self._grid = x, y, z
        self._device = device.index
        self._capability = capability
        self._integers = integers
        self._constants = constants
        self._options = options
        self._overlaps = bool(options.get("launch_pdl"))
        self._functions: dict[TritonFlags, Function] = {}
        self._rooms = _Rooms()

    @property
    def device(self) -> int | None:
        """The index of its GPU."""
        return self._device

    @property
    def launches(self) -> bool:
        """Whether it is on a GPU, and not on the meta device."""
        return self._device is not None

    def flags(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> TritonFlags:
        """The binary that a launch with these takes."""
        told = len(tensors) if self._told is None else self._told
        pointers = [
            None if x is None else (str(x.dtype).removeprefix("torch."), i < told and not x.data_ptr() % ALIGNMENT)
            for i, x in enumerate(tensors)
        ]
        return flags_of(
            self._kernel, self._capability, pointers, self._integers, floats, self._constants, self._options
        )

    def ask(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> None:
        """Has the binary compiled in the background, if it is not there and calls do not wait."""
        if mode() == "background":
            store.shared.ask(self.flags(tensors, floats), self._device)

    def prepare(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> None:
        """Finds the binary, before a launch. Raises what `Binaries.function` raises."""
        self._find(tensors, floats)

    def __call__(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> None:
        """Launches the kernel on torch's current stream of the device. Raises what `prepare` raises."""
        index = self._device
        if index != torch_internals.current_device():
            with torch.cuda.device(index):
                return self(tensors, floats)
        addresses = [x.data_ptr() for x in tensors if x is not None]
        bits = 0
        for address in addresses if self._looked_at is None else addresses[: self._looked_at]:
            bits |= address
        room = self._rooms.of_aligned
        if room is None or bits % ALIGNMENT:
            room = self._room(tensors, floats, not bits % ALIGNMENT)
        room.pack(room.values, 0, *addresses)
        if floats != room.floats:
            room.put(floats)
        room.launch(torch_internals.raw_stream(index))

    def room(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> Room:
        """Arguments of launches by this thread, for who writes them himself: new ones each time. tensors: of which the
        same ones are None, and as many begin where 16 bytes do, as in all launches. The device must be the current one.
        Raises what `prepare` raises."""
        make_current(self._device)
        pointers = len([x for x in tensors if x is not None])
        function = self._find(tensors, floats)
        return Room(function, self._grid, self._device, pointers, self._integers, floats, self._overlaps)

    def _room(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...], aligned: bool) -> Room:
        """This thread's for `__call__`."""
        function = self._find(tensors, floats)
        if self._told is not None:
            self._looked_at = len([x for x in tensors[: self._told] if x is not None])
        rooms = self._rooms
        found = rooms.by_function.get(function)
        if found is None:
            found = rooms.by_function[function] = self.room(tensors, floats)
        if aligned:
            rooms.of_aligned = found
        return found

    def _find(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...]) -> Function:
        flags = self.flags(tensors, floats)
        found = self._functions.get(flags)
        if found is None:
            found = self._functions[flags] = store.shared.function(flags, self._device)
        return found


class Room:
    """Launches of a plain kernel by one thread, and the memory of their arguments: eight bytes each, pointers, then
    integers, then floats. (The driver knows itself how many bytes of each the kernel reads.)

    values: of all arguments, `values[i]` the address that the i-th pointer is; pack: writes these, one after another.
    floats: what was put there last.
    """

    __slots__ = ("_floats_at", "_pack_floats", "floats", "launch", "pack", "values")

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        device: int,
        pointers: int,
        integers: tuple[int, ...],
        floats: tuple[float | None, ...],
        overlaps: bool,
    ) -> None:
        count = len([x for x in floats if x is not None])
        self.values = (ctypes.c_uint64 * (pointers + len(integers) + count + 1))()  # and a 0 for what is not read
        struct.pack_into(f"<{len(integers)}q", self.values, 8 * pointers, *integers)
        self.pack = struct.Struct(f"<{pointers}Q").pack_into
        self._pack_floats, self._floats_at = struct.Struct("<" + "f4x" * count), 8 * (pointers + len(integers))
        self.put(floats)
        first = ctypes.addressof(self.values)
        end = first + ctypes.sizeof(self.values) - 8
        places = [*range(first, end, 8), *[end] * _UNUSED]
        array = (ctypes.c_void_p * len(places))(*places)
        self.launch = BoundLaunch(function, grid, device, array, self.values, overlaps)

    def share(self, i: int, other: Room, j: int) -> None:
        """From now on the i-th pointer is the j-th of the other's, which has to live as long: that one alone is
        written."""
        self.launch.places[i] = ctypes.addressof(other.values) + 8 * j

    def put(self, floats: tuple[float | None, ...]) -> None:
        """Writes the floats."""
        self._pack_floats.pack_into(self.values, self._floats_at, *[x for x in floats if x is not None])
        self.floats = floats


class _Rooms(threading.local):
    """One thread's."""

    of_aligned: Room | None = None  #: for tensors that all are

    def __init__(self) -> None:
        self.by_function: dict[Function, Room] = {}
