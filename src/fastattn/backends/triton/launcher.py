"""Launching a Triton kernel without going through its binder every time.

Triton binds, specialises and looks up each launch in Python: 20 us and more for a kernel of 40 arguments. What it
returns is the compiled kernel, and that can be launched again at a third of the cost as long as everything that Triton
specialises on is the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..._compat import torch as torch_internals
from ..._compat import triton as triton_internals
from ...config import is_on, setting
from ...shape_cache import shape_cache

OVERLAP_CAPABILITY = (9, 0)  #: the first with programmatic dependent launch

INSTALL = "triton is not installed: pip install fastattn[cuda]"
_compiled = shape_cache.section("launches", 1 << 12)
_kept = shape_cache.section("launches", 1 << 12)  #: `Launcher`s by what was said of their calls
_INT32 = 1 << 31
_TRITONS_ON = ("1", "true", "yes", "on", "y")  #: what Triton takes for on; all else is off to it
_ALIGNMENT = 16  #: bytes; Triton compiles a kernel anew for pointers that are no multiple of it


def native(device_type: str) -> bool:
    """True where our own kernels run: on a GPU, and in Triton's interpreter where that is asked for."""
    return not missing(device_type)


def missing(device_type: str) -> list[str]:
    """Why our own kernels do not run on such a device; nothing where they do. Does not import triton.

    Off CUDA only Triton's interpreter runs them: on the CPU, in tests, never unless asked for.
    """
    if device_type == "cuda":
        return missing_on_a_gpu()
    if device_type != "cpu" or not is_on("FASTATTN_INTERPRET", False):
        return ["needs an NVIDIA GPU"]
    if not has_triton():
        return [INSTALL]
    if setting("TRITON_INTERPRET").lower() not in _TRITONS_ON:
        return ["FASTATTN_INTERPRET=1 needs TRITON_INTERPRET=1 as well, set before triton is imported"]
    return []


@cache
def missing_on_a_gpu() -> list[str]:
    """What Triton needs and this machine lacks."""
    if not has_triton():
        return [INSTALL]
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return [] if compiler else ["Triton needs a C compiler to launch its kernels: install gcc, or name one in CC"]


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def overlaps(capability: tuple[int, int]) -> bool:
    """True where a kernel may be launched while the one before it in the stream still runs, to wait for that one itself
    (programmatic dependent launch): 1 to 2 us less for each kernel. Such a kernel begins with `gdc_wait`, in every
    program, and is launched with the option `launch_pdl`."""
    return capability >= OVERLAP_CAPABILITY


def launcher_for(make: Callable[..., Launcher], tensors: Sequence[Tensor | None], *options: Any) -> Launcher:
    """What `make(*tensors, *options)` returns, made once for tensors of the same shapes, strides and dtypes.

    make: a function of a module, which reads nothing of the tensors that is data. options: hashable.
    """
    layouts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    key = make, *layouts, *options
    found: Launcher | None = _kept.get(key)
    if found is None:
        found = _kept[key] = make(*tensors, *options)
    return found


class Launcher:
    """A kernel with its grid, integers and constants: all that is left to say of a launch is tensors and floats.

    The kernel must take its arguments in the order tensors, integers, floats, constants, and declare every integer
    `do_not_specialize`; integers must not be negative. From launch to launch the tensors must have the same dtypes,
    tensors and floats be None at the same places. options: num_warps and the like.
    """

    __slots__ = ("_aligned", "_constants", "_device", "_grid", "_index", "_integers", "_kernel", "_options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        **options: int,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._device = device
        self._index: int | None = device.index if device.type == "cuda" else None
        self._integers = integers
        self._constants = constants
        self._options = options
        self._aligned: Any = None  #: the compiled kernel for tensors that all are

    def __call__(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...] = ()) -> None:
        """Launches the kernel on torch's current stream of the device."""
        index = self._index
        if index is None:  # Triton's interpreter
            self._launch_anew(tensors, floats)
            return
        if index != torch_internals.current_device():  # Triton launches there
            with torch.cuda.device(self._device):
                return self(tensors, floats)
        # Addresses: for a tensor, Triton would ask the driver where it lies.
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            if address is not None:
                bits |= address
        compiled = None if bits % _ALIGNMENT else self._aligned
        if compiled is None:
            name = self._name(tensors, floats)
            compiled = _compiled.get(name)
            if compiled is None:
                compiled = self._launch_anew(tensors, floats)
                if compiled is not None and triton_internals.launches_as_known():
                    _compiled[name] = compiled
                return
            if not bits % _ALIGNMENT:
                self._aligned = compiled
        triton_internals.launch(
            compiled,
            self._grid,
            torch_internals.raw_stream(index),
            *addresses,
            *self._integers,
            *floats,
            *self._constants,
        )

    def _launch_anew(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...]) -> Any:
        return self._kernel[self._grid](*tensors, *self._integers, *floats, *self._constants, **self._options)

    def _name(self, tensors: Sequence[Tensor | None], floats: tuple[float | None, ...]) -> Any:
        """All that Triton looks at: types, None, the alignment of pointers, whether an integer fits 32 bits."""
        pointers = tuple([None if x is None else (x.dtype, x.data_ptr() % _ALIGNMENT == 0) for x in tensors])
        wide = tuple([i for i, x in enumerate(self._integers) if x >= _INT32])
        absent = tuple([x is None for x in floats])
        return self._kernel, self._index, pointers, wide, absent, self._constants, tuple(self._options.items())
