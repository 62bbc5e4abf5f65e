"""A GPU for Hopper's kernels and for decode's on a machine that has none: its driver keeps what it is told to launch.

It runs nothing. Tensors lie on the CPU. A launch's arguments are read as the kernel would read them: by the addresses
that the driver gets, in the order and the types that the compiler is told.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import own_caches
from stand_in_compiler import Driver
from torch import Tensor

from fastattn import debug
from fastattn._compat import torch as torch_internals
from fastattn._compat import triton_compiler
from fastattn.backends.triton import bounds, cuda_driver, key_bias, limits, sums
from fastattn.backends.triton.binaries import launcher, store
from fastattn.backends.triton.binaries.triton_kernel import NamedKernel, TritonFlags
from fastattn.backends.triton.cuda_driver import Function
from fastattn.backends.triton.decode import combination
from fastattn.backends.triton.decode import forward as decode
from fastattn.backends.triton.hopper import launch as hopper_forward
from fastattn.backends.triton.hopper import segments, tensors
from fastattn.backends.triton.hopper_backward import launch as hopper_backward
from fastattn.backends.triton.hopper_wide import launch as hopper_wide
from fastattn.call import Call, Problem

#: By a number that a tensor map holds: maps outlive a driver.
_contents: list[Described] = []
_FORMS = {"i32": "i", "i64": "q", "fp32": "f"}


@dataclasses.dataclass(frozen=True)
class Described:
    """A tensor as the copy engine was told of it; shape and strides (in bytes) from the innermost dim outwards."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def tells(self, x: Tensor) -> bool:
        """Whether it is of `x`, where it lies."""
        sizes, strides = tuple(x.shape)[::-1], [2 * stride for stride in x.stride()[2::-1]]
        there = [i for i, size in enumerate(sizes[1:]) if size > 1]  # strides of what there is one of mean nothing
        same = [self.strides[i] for i in there] == [strides[i] for i in there]
        return (self.address, self.shape) == (x.data_ptr(), sizes) and same

    def values(self, dtype: torch.dtype) -> Tensor:
        """What lies there now, as the copy engine reads it: `[B, H, S, D]`."""
        shape, strides = self.shape[::-1], (*[stride // 2 for stride in self.strides[::-1]], 1)
        count = 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
        memory = (ctypes.c_uint16 * count).from_address(self.address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides).clone()


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch. arguments: by the kernel's names for them."""

    kernel: str
    flags: Any
    programs: tuple[int, ...]
    stream: int
    arguments: dict[str, Any]
    thread: int


class _Signature(Exception):
    pass


@cache
def signature_of(flags: Any) -> dict[str, str]:
    """The types of a kernel's arguments, as its compiler is told them; without constants."""
    with pytest.MonkeyPatch.context() as patch:

        def compiled(kernel: Any, signature: dict[str, str], *rest: Any) -> Any:
            raise _Signature({name: signature[name] for name in kernel.arg_names if signature[name] != "constexpr"})

        patch.setattr(triton_compiler, "compiled", compiled)
        try:
            flags.compile()
        except _Signature as error:
            found: dict[str, str] = error.args[0]
            return found
    raise AssertionError("nothing was compiled")


def aligned_names(flags: Any) -> list[str]:
    """The pointers that a kernel in plain Triton takes to be multiples of 16."""
    if not isinstance(flags, TritonFlags):
        return []
    module, _, name = flags.kernel.partition(":")
    names = NamedKernel(module, name).load().arg_names
    return [names[i] for i in flags.aligned]


def _words(address: int) -> Any:
    return (ctypes.c_uint64 * 16).from_address(address)


class HopperDriver(Driver):
    """See `stand_in_compiler.Driver`. Keeps what it is told, as `launches`."""

    def __init__(self, functions: Sequence[Any]) -> None:
        super().__init__()
        self._functions = functions
        self.launches: list[Launched] = []
        self.encoded = 0  #: maps that were made
        self.moved = 0  #: and told an address by the driver
        self.address_at = 0  #: which word of a map is the address
        self.with_context: set[int] = set()  #: threads that were given one
        self.before: Any = None  #: called before each launch
        self.after: Any = None  #: called with each launch, before who launched goes on

    def cuModuleGetFunction(self, handle: Any, module: Any, name: bytes) -> int:
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 1 + int(name)
        return 0

    def cuTensorMapEncodeTiled(self, made: Any, kind: int, rank: int, address: Any, *rest: Any) -> int:
        if threading.get_ident() not in self.with_context:
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        shape, strides, box = (tuple(x) for x in rest[:3])
        self.encoded += 1
        ctypes.memset(made.value, 0xA5, 128)
        words = _words(made.value)
        of = Described(0, shape, strides, box)
        if of not in _contents:
            _contents.append(of)
        words[self.address_at], words[1 - self.address_at] = address.value, _contents.index(of)
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        self.with_context.add(threading.get_ident())
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 1
        return 0

    def cuTensorMapReplaceAddress(self, made: Any, address: Any) -> int:
        self.moved += 1
        _words(made.value)[self.address_at] = address.value
        return 0

    def described(self, where: int) -> Described:
        """What the map at that address says now."""
        words = _words(where)
        return dataclasses.replace(_contents[words[1 - self.address_at]], address=words[self.address_at])

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, _: Any) -> int:
        if self.before is not None:
            self.before()
        flags = self._functions[function.value - 1]
        found: dict[str, Any] = {}
        at = 0
        for name, kind in signature_of(flags).items():
            if kind.startswith("tensordesc"):
                rank = kind.partition("[")[2].partition("]")[0].count(",") + 1
                found[name] = self.described(arguments[at])
                at += 1 + 2 * rank
            else:
                form = "Q" if kind.startswith("*") else _FORMS[kind]
                (found[name],) = struct.unpack(form, ctypes.string_at(arguments[at], struct.calcsize(form)))
                at += 1
        assert at + 2 == len(arguments), "arguments, and two that Triton adds"
        for name in aligned_names(flags):
            assert found[name] % 16 == 0, f"{name} is not aligned, as this binary takes it to be"
        told = config._obj
        name = getattr(flags, "kernel", None) or str(flags)
        launched = Launched(name, flags, tuple(told.grid), told.stream or 0, found, threading.get_ident())
        self.launches.append(launched)
        if self.after is not None:
            self.after(launched)
        return 0


class HopperGpu:
    """What stands for the GPU. device, stream: those that are current."""

    def __init__(self) -> None:
        self.functions: list[Any] = []
        self.driver = HopperDriver(self.functions)
        self.device: int | None = None  #: tensors of the CPU have no index, which is that of "the" device here
        self.stream = 0
        self._made: dict[Any, Function] = {}

    def function(self, flags: Any, device: int | None = None) -> Function:
        if flags not in self._made:
            self._made[flags] = Function(b"\x7fELF", str(len(self.functions)), 1024, 128)
            self.functions.append(flags)
        return self._made[flags]

    @contextmanager
    def on(self, index: int | None) -> Iterator[None]:
        """As torch.cuda.device."""
        before, self.device = self.device, index
        try:
            yield
        finally:
            self.device = before

    def taken(self) -> list[Launched]:
        """What was launched since the last time."""
        found, self.driver.launches = self.driver.launches, []
        return found


def side_by_side(gpu: HopperGpu, threads: int, run: Callable[[], None]) -> None:
    """Has as many threads run it, of which each waits before a launch until all others are about to launch, too."""
    gate = threading.Barrier(threads)
    gpu.driver.before = lambda: gate.wait(10)
    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def allocate_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call allocates lies where it lay in the call before: after a first call nothing is new."""
    again = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
    memory = torch.empty(1 << 20, dtype=torch.uint8)

    def allocator(device: torch.device) -> Any:
        made: dict[Any, Tensor] = {}

        def make(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
            if dtype not in made:
                made[dtype] = torch.empty_strided(shape, strides, dtype=dtype)
            found: Tensor = again(made[dtype], shape, strides, 0)
            return found

        return make

    def scratch(device: torch.device, size: int, stream: int | None = None) -> Tensor:
        assert size <= len(memory)
        return memory

    counters = torch.zeros(1 << 10, dtype=torch.int32)

    def counted(device: torch.device, size: int, count: int, stream: int) -> tuple[Tensor, Tensor]:
        assert count <= len(counters)
        return scratch(device, size), counters

    monkeypatch.setattr(torch_internals, "allocator", allocator)
    monkeypatch.setattr(decode, "counted", counted)
    for module in (hopper_forward, hopper_backward.run, hopper_wide, decode):
        monkeypatch.setattr(module, "scratch", scratch)


def pretend(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    """From now on the backends "hopper" and "decode" take tensors of the CPU, and its driver runs nothing. No settings
    of the machine's count."""
    monkeypatch.setattr(debug, "ENABLED", False)
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN"):
        monkeypatch.delenv(name, raising=False)
    gpu, problem_of = HopperGpu(), Problem.of

    def on_gpu(call: Call, backward: bool = False) -> Problem:
        return dataclasses.replace(problem_of(call, backward), device="cuda", index=0, capability=(9, 0))

    def launcher_of(kernel: Any, grid: Any, device: torch.device, *rest: Any, **options: int) -> Any:
        device = device if device.type == "meta" else torch.device("cuda")
        return launcher.BinaryLauncher(kernel, grid, device, *rest, **options)

    set_ = monkeypatch.setattr
    set_(Problem, "of", staticmethod(on_gpu))
    own_caches(monkeypatch)
    set_(tensors, "_tensor_map", cache(tensors._tensor_map.__wrapped__))
    set_(cuda_driver, "_driver", lambda: gpu.driver)
    set_(torch_internals, "current_device", lambda: gpu.device)
    set_(torch_internals, "raw_stream", lambda index: gpu.stream)
    set_(torch.cuda, "device", gpu.on)
    set_(limits, "missing", lambda device: [])
    set_(launcher.BinaryLauncher, "launches", True)
    ready = SimpleNamespace(function=gpu.function, find=gpu.function, ready=gpu.function, ask=lambda *_: None)
    set_(store, "shared", ready)
    for module in (bounds, key_bias, segments, hopper_backward, combination, decode, sums):
        set_(module, "launcher_of", launcher_of)
    for module in (hopper_forward, hopper_backward, hopper_wide, decode):
        set_(module, "sm_count", lambda index: 132)
    set_(decode, "shared_memory", lambda index: 227 << 10)
    return gpu
