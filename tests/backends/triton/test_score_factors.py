"""A softcap so small, or a scale so large, that float32 does not hold one by the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hopper_launches import HopperGpu, pretend

import fastattn

pytest.importorskip("triton")
attend = fastattn.scaled_dot_product_attention
STEEP = [(1e30, 1e-30), (1e10, 1e-30), (1e30, 1e-9)]


@pytest.mark.parametrize("scale, softcap", STEEP)
def test_scores_of_zero_stay_zero(scale: float, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 * inf is NaN: all other scores are at the cap, those of a zero query are not."""
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    q[:, :, 0] = 0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    results = []
    for backend in ("prefill", "reference"):
        out = attend(q, k, v, scale=scale, softcap=softcap, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    found, want = results
    for x, y in zip(found[:1] + found[3:], want[:1] + want[3:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in found)


def test_what_hopper_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: HopperGpu = pretend(monkeypatch)
    for scale, softcap in STEEP:
        for _ in range(2):  # the second call's factors are there already
            q, k, v = (torch.randn(1, 2, 20, 64).bfloat16().requires_grad_() for _ in range(3))
            out = attend(q, k, v, scale=scale, softcap=softcap, backend="hopper")
            torch.autograd.grad(out.sum(), (q, k, v))
            told = [x.arguments for x in gpu.taken() if "inner" in x.arguments]
            assert len(told) == 2
            for arguments in told:
                assert arguments["inner"] == np.float32(1e38)
                assert arguments["scale"] == np.float32(softcap * np.log2(np.e))


def test_what_hopper_is_told_for_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: HopperGpu = pretend(monkeypatch)
    for scale, softcap in STEEP:
        for _ in range(2):
            q, k, v = (torch.randn(1, 2, 20, 320).bfloat16() for _ in range(3))
            attend(q, k, v, scale=scale, softcap=softcap, backend="hopper")
            told = [x.arguments for x in gpu.taken() if "inner" in x.arguments]
            assert [(x["inner"], x["scale"]) for x in told] == [(np.float32(1e38), np.float32(softcap * np.log2(np.e)))]
