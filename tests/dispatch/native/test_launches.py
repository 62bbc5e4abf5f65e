"""What the module launches for a call is what Python launches for it: kernels, grids, streams, every argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hopper_launches import HopperGpu
from native_driver import NativeDriver
from native_launches import CASES, HKV, B, H, S, both_ways, made, tensors_of
from torch import Tensor

import fastattn

attend = fastattn.scaled_dot_product_attention


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
    leaves += [options["sinks"].requires_grad_()] if "sinks" in options else []
    grad_out, outs = made(H, dim=dim), []

    def run() -> Any:
        out = attend(*leaves[:3], **options)
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
