"""What the module launches for a call is what Python launches for it: kernels, grids, streams, every argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hopper_launches import Described, HopperGpu, Launched, pretend
from native_driver import NativeDriver, take
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn.dispatch.native import calls

attend = fastattn.scaled_dot_product_attention
B, H, HKV, S = 2, 4, 2, 300


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[HopperGpu]:
    found = pretend(monkeypatch)
    yield found
    if calls.module is not None:
        calls.module.clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, gpu: HopperGpu) -> NativeDriver:
    return take(monkeypatch, gpu)


def made(heads: int, length: int = S, dim: int = 64) -> Tensor:
    return torch.randn(B, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def segments() -> Segments:
    return Segments(ints(0, 0, 9, 0, 9, 200, 1, 3, 300).view(3, 3).T.contiguous().T, True)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"mask": "causal"},
    "full": dict,
    "scaled": lambda: {"scale": 0.2},
    "window": lambda: {"mask": "causal", "window": (100, -1)},
    "softcap": lambda: {"mask": "causal", "softcap": 30.0},
    "sinks": lambda: {"mask": "causal", "sinks": torch.randn(H)},
    "lengths": lambda: {"mask": "causal", "q_lengths": ints(7, 300), "kv_lengths": ints(300, 11)},
    "intervals": lambda: {"mask": Intervals(ints(0, 3)[:, None], ints(200, 300)[:, None])},
    "segments": lambda: {"mask": segments()},
}


class Symbols:
    """Names of addresses: those of tensors that are known, and the rest by their order within a piece of memory."""

    def __init__(self, known: dict[str, Tensor]) -> None:
        self.known = {x.data_ptr(): name for name, x in known.items()}

    def of(self, launches: list[Launched]) -> list[Any]:
        found = []
        unknown: dict[int, str] = {}

        def named(address: int) -> str:
            if address in self.known:
                return self.known[address]
            assert address % 16 == 0 and address > 0
            return unknown.setdefault(address, f"new {len(unknown)}")

        for launch in launches:
            arguments = []
            for name, x in launch.arguments.items():
                if isinstance(x, Described):
                    arguments.append((name, named(x.address), x.shape, x.strides, x.box))
                elif isinstance(x, int) and x > 1 << 32:
                    arguments.append((name, named(x)))
                else:
                    arguments.append((name, x))
            found.append((launch.kernel, launch.flags, launch.programs, launch.stream, arguments))
        return found


def both_ways(
    gpu: HopperGpu, driver: NativeDriver, run: Callable[[], Any], known: Callable[[], dict[str, Tensor]]
) -> tuple[list[Any], list[Any]]:
    """The launches of Python and of the module for the same call."""
    run()
    gpu.taken()
    module, calls.module = calls.module, None
    out = run()
    python = Symbols(known() | results(out)).of(gpu.taken())
    calls.module = module
    for _ in range(3):
        run()
    gpu.taken()
    before = driver.launches
    out = run()
    launched = gpu.taken()
    assert driver.launches - before == len(launched), "Python launched something"
    return python, Symbols(known() | results(out)).of(launched)


def results(out: Any) -> dict[str, Tensor]:
    found = out if isinstance(out, tuple) else (out,)
    return {f"result {i}": x for i, x in enumerate(found)}


def tensors_of(options: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in options.items():
        parts = x if isinstance(x, tuple) else (x,)
        found |= {f"{name} {i}": part for i, part in enumerate(parts) if isinstance(part, Tensor)}
    return found


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_a_forward(name: str, dim: int, gpu: HopperGpu, driver: NativeDriver) -> None:
    options, q, k, v = CASES[name](), made(H, dim=dim), made(HKV, dim=dim), made(HKV, dim=dim)
    known = {"q": q, "k": k, "v": v} | tensors_of(options)
    python, native = both_ways(gpu, driver, lambda: attend(q, k, v, **options), lambda: known)
    assert native == python


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_a_backward(name: str, dim: int, gpu: HopperGpu, driver: NativeDriver) -> None:
    options = CASES[name]()
    leaves = [made(heads, dim=dim).requires_grad_() for heads in (H, HKV, HKV)]
    grad_out, outs = made(H, dim=dim), []

    def run() -> Any:
        out = attend(*leaves, **options)
        outs.append(out)
        return torch.autograd.grad(out, leaves, grad_out)

    def known() -> dict[str, Tensor]:
        return dict(zip("qkv", leaves)) | {"grad_out": grad_out, "out": outs[-1]} | tensors_of(options)

    python, native = both_ways(gpu, driver, run, known)
    assert native == python


@pytest.mark.parametrize("keys", [40, 5000])
@pytest.mark.parametrize("name", ["causal", "lengths", "sinks", "softcap", "intervals"])
def test_decode(name: str, keys: int, gpu: HopperGpu, driver: NativeDriver) -> None:
    options, q, k, v = CASES[name](), made(H, 1, 128), made(HKV, keys, 128), made(HKV, keys, 128)
    options.pop("q_lengths", None)
    known = {"q": q, "k": k, "v": v} | tensors_of(options)
    python, native = both_ways(gpu, driver, lambda: attend(q, k, v, **options), lambda: known)
    assert native == python


def test_values_where_the_keys_are_go_through_python(gpu: HopperGpu, driver: NativeDriver) -> None:
    q, k, v = made(H, 1, 128), made(HKV, 100, 128), made(HKV, 100, 128)
    for _ in range(3):
        attend(q, k, v, mask="causal")
    before = driver.launches
    attend(q, k, k, mask="causal")
    assert driver.launches == before
    attend(q, k, v, mask="causal")
    assert driver.launches > before


def test_addresses_that_kernels_cannot_read_go_through_python(gpu: HopperGpu, driver: NativeDriver) -> None:
    k, v = made(HKV), made(HKV)
    memory = torch.randn(B * S * H * 64 + 1, dtype=torch.bfloat16)
    q, shifted = (memory[i:][: B * S * H * 64].view(B, S, H, 64).transpose(1, 2) for i in (0, 1))
    for _ in range(3):
        attend(q, k, v)
    before = driver.launches
    attend(shifted, k, v)
    assert driver.launches == before
    attend(q, k, v)
    assert driver.launches == before + 1


def test_a_launch_that_fails_is_pythons(gpu: HopperGpu, driver: NativeDriver) -> None:
    q, k, v = made(H), made(HKV), made(HKV)
    for _ in range(3):
        attend(q, k, v)
    gpu.taken()
    driver.fails = True
    assert attend(q, k, v).shape == q.shape
    assert len(gpu.taken()) == 1


def test_deterministic_algorithms_go_through_python(
    gpu: HopperGpu, driver: NativeDriver, request: pytest.FixtureRequest
) -> None:
    q, k, v = made(H), made(HKV), made(HKV)
    for _ in range(3):
        attend(q, k, v)
    before = driver.launches
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    attend(q, k, v)
    assert driver.launches == before
