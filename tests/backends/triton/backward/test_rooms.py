"""What a repeated call of the backward tells the driver: what the first one did, of its own tensors."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

from hopper_launches import HopperGpu, Launched, pretend
from torch import Tensor

from fastattn.backends.triton.backward import backward, before, passes, rooms
from fastattn.backends.triton.binaries import launcher
from fastattn.backends.triton.prefill import lists
from fastattn.backends.triton.program import SOURCES
from fastattn.call import Call, Gradients, Problem

BF16 = torch.bfloat16
B, H, HKV, D = 2, 4, 2, 64
NEW = ("out", "lse", "grad_out", "grad_lse")  #: besides the tensors of the call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HopperGpu:
    found = pretend(monkeypatch)

    def launcher_of(kernel: Any, grid: Any, device: torch.device, *rest: Any, **options: int) -> Any:
        device = device if device.type == "meta" else torch.device("cuda")
        return launcher.BinaryLauncher(kernel, grid, device, *rest, **options)

    for module in (passes, before, lists):
        monkeypatch.setattr(module, "launcher_of", launcher_of)
    return found


def made(heads: int, length: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(B, length, heads, D).to(dtype).transpose(1, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call_of(kind: str) -> tuple[Call, Tensor | None]:
    """A call, and the gradient of its log-sum-exp."""
    length = 1100 if "long" in kind else 70
    call = Call(made(H, length), made(HKV, length), made(HKV, length), scale=0.2, right=0, grads="qkv")
    grad_lse = None
    if "bool" in kind:
        call = call._replace(mask=torch.rand(B, 1, length, length) > 0.2)
    if "keys" in kind:
        call = call._replace(mask=torch.rand(B, 1, 1, length) > 0.2)
    if "bias" in kind:
        call = call._replace(mask=torch.randn(1, H, length, length).to(BF16), grads="qkvm")
    if "sinks" in kind:
        call = call._replace(sinks=torch.randn(H), grads=call.grads + "s")
    if "softcap" in kind:
        call = call._replace(softcap=30.0)
    if "lengths" in kind:
        call = call._replace(q_lengths=ints(length, 9), kv_lengths=ints(length - 1, 40))
    if "intervals" in kind:
        call = call._replace(lo=torch.zeros(1, length).int(), hi=torch.arange(1, length + 1).int()[None], right=-1)
    if "lse" in kind:
        grad_lse = torch.randn(B, H, length)
        call = call._replace(return_lse=True)
    return call, grad_lse


KINDS = (
    *("plain", "bool", "bool long", "keys", "keys long", "bias", "bias sinks softcap lse", "sinks", "softcap lengths"),
    *("intervals", "intervals lse sinks", "bool lse lengths long"),
)


def told(launches: Sequence[Launched], named: dict[str, int], memory: tuple[int, int]) -> list[Any]:
    """The launches with names in the place of addresses; those in the memory counted from its start."""
    names = {address: name for name, address in named.items()}

    def name_of(value: Any) -> Any:
        if isinstance(value, int) and memory[0] <= value < memory[1]:
            return "memory", value - memory[0]
        return names.get(value, value) if isinstance(value, int) and value > 1 << 20 else value

    return [
        (x.kernel, x.flags, x.programs, x.stream, {key: name_of(value) for key, value in x.arguments.items()})
        for x in launches
    ]


def run(
    kernel: Any, gpu: HopperGpu, call: Call, upstream: Sequence[Tensor | None], memory: Tensor
) -> tuple[list[Any], Gradients]:
    found = kernel.backward(call, *upstream)
    given = {name: getattr(call, name) for name in Call._fields} | dict(zip(NEW, upstream, strict=True))
    given |= {f"d{name}": x for name, x in zip(Gradients._fields, found, strict=True)}
    named = {name: x.data_ptr() for name, x in given.items() if isinstance(x, Tensor)}
    assert len(set(named.values())) == len(named)
    return told(gpu.taken(), named, (memory.data_ptr(), memory.data_ptr() + len(memory))), found


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_calls(kind: str, gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tensors, another scale, another stream, memory elsewhere; then as if no call had been before."""
    memory = torch.empty(1 << 25, dtype=torch.uint8)
    place = [0]

    def scratch(device: torch.device, size: int, stream: int | None = None) -> Tensor:
        assert stream in (None, gpu.stream)
        return memory[place[0] : place[0] + size]

    for module in (backward, rooms):
        monkeypatch.setattr(module, "scratch", scratch)
    first, _ = call_of(kind)
    kernel = backward.bind(Problem.of(first, True), first)
    quick = kernel._quick
    assert quick is not None
    taken = []
    monkeypatch.setattr(rooms.Quick, "remember", _counted(rooms.Quick.remember, taken))
    held = []
    for turn in range(6):
        call, grad_lse = call_of(kind)
        call = call._replace(scale=0.1 * (turn % 3 + 1))
        upstream = made(H, call.q.shape[2]), torch.randn(B, H, call.q.shape[2]), made(H, call.q.shape[2]), grad_lse
        gpu.stream, place[0] = 70 + turn, 256 * turn
        found, grads = run(kernel, gpu, call, upstream, memory[place[0] :])
        kernel._quick = None
        wanted, others = run(kernel, gpu, call, upstream, memory[place[0] :])
        kernel._quick = quick
        assert found == wanted
        for x, y in zip(grads, others, strict=True):
            assert (x is None) == (y is None)
            assert x is None or (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)  # type: ignore[union-attr]
        held.append((call, upstream, grads))
        assert len(taken) == 1, "only the first call took the long way"


@pytest.mark.parametrize("kind", KINDS)
def test_programs(kind: str, gpu: HopperGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the addresses of a call's tensors in it, a program launches what Python launches."""
    memory = torch.empty(1 << 25, dtype=torch.uint8)
    for module in (backward, rooms):
        monkeypatch.setattr(module, "scratch", lambda device, size, stream=None: memory[:size])
    call, _ = call_of(kind)
    kernel = backward.bind(Problem.of(call, True), call)
    upstream = made(H, call.q.shape[2]), torch.randn(B, H, call.q.shape[2]), made(H, call.q.shape[2])
    wanted, _ = run(kernel, gpu, call, (*upstream, None), memory)
    program = kernel.backward_program(call, *upstream)
    assert program is not None and program.memory <= len(memory)
    given = call._asdict() | dict(zip(NEW, upstream))
    found = {name: make() for name, make in program.made.items()}
    at = {name: x for name, x in (given | found | {"memory": memory}).items() if isinstance(x, Tensor)}
    assert program.aligned == at.keys() - found.keys() - {"memory"}
    for address, source, offset in program.writes:
        ctypes.c_uint64.from_address(address).value = at[SOURCES[source]].data_ptr() + offset
    for launch in program.launches:
        launch(gpu.stream)
    named = {name.replace("grad_", "d") if name in found else name: x.data_ptr() for name, x in at.items()}
    del named["memory"]
    assert told(gpu.taken(), named, (memory.data_ptr(), memory.data_ptr() + len(memory))) == wanted


def _counted(function: Any, calls: list[Any]) -> Any:
    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        function(*arguments)

    return counted


def test_what_cannot_be_read_where_it_is(gpu: HopperGpu) -> None:
    """A misaligned tensor, another layout, another thread: each finds its own launches, and leaves the others'."""
    call, _ = call_of("bool")
    kernel = backward.bind(Problem.of(call, True), call)
    upstream = made(H, 70), torch.randn(B, H, 70), made(H, 70), None
    for _ in range(2):
        kernel.backward(call, *upstream)
    usual = [x.flags for x in gpu.taken()]
    wide = torch.randn(B, 70, H, D + 8).to(BF16).transpose(1, 2)
    odd = wide[..., 1 : D + 1]  # is copied
    for out, grad_out in ((odd, upstream[2]), (upstream[0], odd), (upstream[0], wide[..., :D])):
        kernel.backward(call, out, upstream[1], grad_out, None)
        read = {value for x in gpu.taken() for value in x.arguments.values()}
        assert (grad_out.data_ptr() in read) == (grad_out is not odd)
    mask = torch.rand(B * 70 * 70 + 16) > 0.2
    odd_mask = mask[1 : B * 70 * 70 + 1].view(B, 1, 70, 70)
    kernel.backward(call._replace(mask=odd_mask), *upstream)
    assert any(odd_mask.data_ptr() in x.arguments.values() for x in gpu.taken())
    in_thread: list[Any] = []
    thread = threading.Thread(target=lambda: in_thread.append(kernel.backward(call, *upstream)))
    thread.start()
    thread.join()
    kernel.backward(call, *upstream)
    assert [x.flags for x in gpu.taken()] == 2 * usual[: len(usual) // 2]
