"""`attention.cpp` over the driver of `hopper_launches.py`, which runs nothing: it sees what is launched."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
from hopper_launches import HopperGpu

from fastattn.backends.triton import cuda_driver
from fastattn.dispatch.native import calls, library

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_module: Any = None


def compiled() -> Any:
    """The module, compiled once for this process. Skips where it cannot be."""
    global _module
    if _module is None:
        why = library.hindrance()
        if why:
            pytest.skip(why)
        _module = library.made()
    return _module


class NativeDriver:
    """What the module launches with. launches: how many it made. fails: so does every launch. quiet: none is looked
    at."""

    def __init__(self, gpu: HopperGpu) -> None:
        self.gpu, self.launches, self.fails, self.quiet = gpu, 0, False, False
        self.places: dict[int, Any] = {}  #: arrays of arguments' addresses, by their own
        self.function = LAUNCH(self._launch)

    def _launch(self, config: Any, function: Any, places: Any, _: Any) -> int:
        if self.fails:
            return 1
        self.launches += 1
        if self.quiet:
            return 0
        told = SimpleNamespace(_obj=cuda_driver._Config.from_address(config))
        return self.gpu.driver.cuLaunchKernelEx(told, SimpleNamespace(value=function), self.places[places], None)


def take(monkeypatch: pytest.MonkeyPatch, gpu: HopperGpu) -> NativeDriver:
    """From now on the module serves what it is offered."""
    driver = NativeDriver(gpu)
    parts = cuda_driver.BoundLaunch.parts.fget

    def seen(self: Any) -> tuple[int, int, int, int]:
        found = parts(self)  # type: ignore[misc]
        driver.places[found[3]] = self.places
        return found  # type: ignore[no-any-return]

    monkeypatch.setattr(cuda_driver.BoundLaunch, "parts", property(seen))
    address = ctypes.cast(driver.function, ctypes.c_void_p).value or 0
    monkeypatch.setattr(cuda_driver, "functions", lambda: (address, 0, 0, 0))
    monkeypatch.setattr(calls, "module", None)
    calls._take(compiled())
    calls.module.clear()
    return driver
