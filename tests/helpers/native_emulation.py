"""The reference with programs: `attention.cpp` serves its calls, over launches that compute what the reference does.

So a machine without a GPU runs all of the native way but the kernels: keys, allocations, addresses, the link to the
backward. A "kernel" is a function of Python that reads the addresses it is given.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_driver import LAUNCH, compiled
from torch import Tensor

import fastattn
from fastattn.backends import reference
from fastattn.backends import torch as torchs
from fastattn.backends.layout import Fresh
from fastattn.backends.triton import cuda_driver
from fastattn.backends.triton.program import SOURCES, Program
from fastattn.call import CALL, Call, Gradients
from fastattn.dispatch.native import calls


class _Launch:
    """What stands for a `BoundLaunch`: a function of the addresses."""

    def __init__(self, run: Callable[[Any], None]) -> None:
        self.run = run
        self.values = (ctypes.c_uint64 * len(SOURCES))()
        self._config = (ctypes.c_uint64 * 2)()

    @property
    def parts(self) -> tuple[int, int, int, int]:
        config = ctypes.addressof(self._config)
        return config, config + 8, id(self), ctypes.addressof(self.values)


class Emulation:
    """launches: how many there were. errors: of what was launched. fails: so does every launch. before: called before
    each one."""

    def __init__(self) -> None:
        self.launches, self.errors, self.fails = 0, [], False  # type: ignore[var-annotated]
        self.before: Callable[[], None] | None = None
        self.function = LAUNCH(self._launch)
        self._made: weakref.WeakValueDictionary[int, _Launch] = weakref.WeakValueDictionary()

    def _launch(self, config: Any, function: Any, places: Any, _: Any) -> int:
        if self.fails:
            return 1
        if self.before is not None:
            self.before()
        self.launches += 1
        launch = self._made[function]
        try:
            with torch.no_grad():
                launch.run(launch.values)
        except Exception as error:
            self.errors.append(error)
        return 0

    @property
    def programs(self) -> int:
        """How many there are."""
        return len(self._made)

    def program(self, made: dict[str, Fresh], given: dict[str, Tensor], run: Callable[[dict[str, Tensor]], Any]) -> Any:
        """Of what `run` returns for tensors by name: those that are made, by their names."""
        layouts = {name: (x.shape, x.stride(), x.dtype) for name, x in given.items()}
        layouts |= {name: (x.shape, x.strides, x.dtype) for name, x in made.items()}
        inputs, outputs = list(given), list(made)  # a program holds no tensors

        def launched(values: Any) -> None:
            tensors = {name: at(values[SOURCES.index(name)], *layout) for name, layout in layouts.items()}
            for name, x in run({name: tensors[name] for name in inputs}).items():
                if name in outputs:
                    tensors[name].copy_(x)

        launch, program = _Launch(launched), Program(made, 64)
        self._made[id(launch)] = launch
        for name in layouts:
            program.write(launch.values, SOURCES.index(name), name)
        program.launches.append(launch)  # type: ignore[arg-type]
        return program


def at(address: int, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    """The tensor that lies there."""
    if 0 in shape:
        return torch.empty_strided(shape, strides, dtype=dtype)
    count = 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def fresh(x: Tensor) -> Fresh:
    return Fresh(x.shape, x.stride(), x.dtype, x.device)


def _with_tensors(call: Call, tensors: dict[str, Tensor]) -> Call:
    return call._replace(**{name: x for name, x in tensors.items() if name in CALL.names})  # type: ignore[arg-type]


def _given(call: Call) -> dict[str, Tensor]:
    return {name: x for name, x in zip(CALL.tensor_names, CALL.tensors(call), strict=True) if x is not None}


def _bare(call: Call) -> Call:
    """Its options: a program holds no tensors of a call."""
    return CALL.join([None] * len(CALL.tensor_names), CALL.options(call))  # type: ignore[no-any-return]


def give_programs(monkeypatch: pytest.MonkeyPatch, emulation: Emulation, kernel: Any) -> None:
    """To a class of kernels."""
    forward, backward = kernel.forward, kernel.backward

    def program(self: Any, call: Call) -> Any:
        if 0 in (*call.q.shape, *call.k.shape, *call.v.shape):
            return None
        with torch.no_grad():
            out, lse = forward(self, call)
        made, options = {"out": fresh(out), **({} if lse is None else {"lse": fresh(lse)})}, _bare(call)

        def run(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
            return dict(zip(("out", "lse"), forward(self, _with_tensors(options, tensors)), strict=True))

        return emulation.program(made, _given(call), run)

    def backward_program(self: Any, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Any:
        grads, options = backward(self, call, out, lse, grad_out, None), _bare(call)
        made = {f"grad_{name}": fresh(x) for name, x in zip(Gradients._fields, grads) if x is not None}

        def run(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
            upstream = [tensors[name] for name in ("out", "lse", "grad_out")]
            found = backward(self, _with_tensors(options, tensors), *upstream, None)
            return {f"grad_{name}": x for name, x in zip(Gradients._fields, found, strict=True)}

        return emulation.program(made, _given(call) | {"out": out, "lse": lse, "grad_out": grad_out}, run)

    monkeypatch.setattr(kernel, "program", program, raising=False)
    monkeypatch.setattr(kernel, "backward_program", backward_program, raising=False)


def take(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """From now on the kernels of the reference and of torch have programs, and the module serves what it is offered."""
    emulation = Emulation()
    for kernel in (reference._ReferenceKernel, torchs._TorchKernel):
        give_programs(monkeypatch, emulation, kernel)
    address = ctypes.cast(emulation.function, ctypes.c_void_p).value or 0
    monkeypatch.setattr(cuda_driver, "functions", lambda: (address, 0, 0, 0))
    monkeypatch.setattr(calls, "module", None)
    calls._take(compiled())
    fastattn.clear_plans()  # what was bound before has programs of another emulation
    return emulation
