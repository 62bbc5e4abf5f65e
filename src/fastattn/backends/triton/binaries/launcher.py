"""Launching a plain Triton kernel by its binary: no launch waits for Triton's compiler, nor goes through its binder."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...._compat import torch as torch_internals
from ..cuda_driver import Function, make_current
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
    found = [(x, tensors, floats) for x, tensors, floats in launches if isinstance(x, BinaryLauncher) and x.launches]
    for launcher, tensors, floats in found:
        launcher.ask(tensors, floats)
    for launcher, tensors, floats in found:
        launcher.prepare(tensors, floats)


def flag_sets(launches: Sequence[Launch]) -> list[FlagSet]:
    """The binaries that launches take, in order."""
    return [x.flags(tensors, floats) for x, tensors, floats in launches if isinstance(x, BinaryLauncher)]


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
        *("_aligned", "_capability", "_constants", "_device", "_functions", "_grid", "_integers", "_kernel"),
        *("_local", "_looked_at", "_options", "_overlaps", "_told"),
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
        self._aligned: Function | None = None  #: the binary for tensors that all are
        self._functions: dict[TritonFlags, Function] = {}
        self._local = threading.local()

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
        for address in addresses[: self._looked_at]:
            bits |= address
        function = None if bits % ALIGNMENT else self._aligned
        if function is None:
            function = self._find(tensors, floats)
            if self._told is not None:
                self._looked_at = len([x for x in tensors[: self._told] if x is not None])
            if not bits % ALIGNMENT:
                self._aligned = function
        kept = self._local.__dict__
        if not kept:
            make_current(index)
            kept["pack"], kept["values"], kept["places"] = _room(len(addresses), self._integers, floats)
        kept["pack"].pack_into(kept["values"], 0, *addresses, *self._integers, *[x for x in floats if x is not None])
        stream = torch_internals.raw_stream(index)
        function.launch_grid(self._grid, index, stream, kept["places"], self._overlaps)

    def _find(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...]) -> Function:
        flags = self.flags(tensors, floats)
        found = self._functions.get(flags)
        if found is None:
            found = self._functions[flags] = store.shared.function(flags, self._device)
        return found


def _room(pointers: int, integers: tuple[int, ...], floats: tuple[float | None, ...]) -> tuple[struct.Struct, Any, Any]:
    """What packs a launch's values, eight bytes each, where to, and the addresses of them all, as the driver wants
    them. (It knows itself how many bytes of each the kernel reads.)"""
    count = len([x for x in floats if x is not None])
    pack = struct.Struct("<" + "Q" * pointers + "q" * len(integers) + "f4x" * count)
    values = ctypes.create_string_buffer(pack.size + 8)
    first = ctypes.addressof(values)
    places = [*range(first, first + pack.size, 8), *[first + pack.size] * _UNUSED]
    return pack, values, (ctypes.c_void_p * len(places))(*places)
