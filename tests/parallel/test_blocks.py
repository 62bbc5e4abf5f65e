"""The blocks of every rank, computed in one process without any exchange: what the ring and the gathering add up to."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor

from fastattn import masks, scaled_dot_product_attention
from fastattn.call import Call, Gradients, Problem
from fastattn.dispatch import serve
from fastattn.dispatch.registry import allowed
from fastattn.dispatch.routes import Route
from fastattn.parallel import blocks
from fastattn.parallel.blocks import Options, Rows, Whole
from fastattn.parallel.layout import Layout
from fastattn.parallel.merge import merge_, merge_all
from fastattn.parallel.plan import Pattern, Plan

PATTERNS = {
    "causal": {"right": 0},
    "full": {},
    "window": {"left": 30, "right": 0},
    "packed": {"right": 0, "segments": ((0, 0, 45), (0, 45, 60), (0, 60, 130))},
}


def spread(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, pattern: Pattern, ranks: int, ring: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, dq, dk, dv of the whole sequence, put together from what each rank would compute."""
    layout = Layout(pattern.length, ranks)
    options = Options(q.shape[3] ** -0.5, None, allowed())
    outs, lses, dqs = [], [], []
    dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    for rank in range(ranks):
        plan = Plan(layout, rank, pattern, q.device)
        mine, rows = layout.take(q, 2, rank), None
        rows = Rows(mine, v.shape[3], once=False)
        sources: list[tuple[Tensor, Any, Any]] = [(torch.arange(pattern.length), plan.whole, plan.whole_backward)]
        if ring:
            held = [
                torch.cat([layout.positions(s.source)[a:b] for a, b in s.receive] or [torch.arange(0)])
                for s in plan.steps
            ]
            sources = [(at, s.blocks, s.blocks) for at, s in zip(held, plan.steps)]
        for at, forward, _ in sources:
            blocks.forward(rows, mine, k[:, :, at], v[:, :, at], forward, options)
        out, lse = rows.finish(None)
        whole = Whole(out, lse, layout.take(do, 2, rank), None)
        dq = torch.zeros_like(mine, dtype=dk.dtype)
        for at, _, backward in sources:
            keys, values = k[:, :, at], v[:, :, at]
            into = dq, torch.zeros_like(keys, dtype=dk.dtype), torch.zeros_like(values, dtype=dk.dtype)
            blocks.backward(into, mine, keys, values, whole, backward, options)
            dk[:, :, at] += into[1]
            dv[:, :, at] += into[2]
        outs.append(out)
        lses.append(lse)
        dqs.append(dq)
    return layout.join(outs, 2), layout.join(lses, 2), layout.join(dqs, 2), dk, dv


def inputs(length: int, heads: tuple[int, int], dim: int, **kind: Any) -> list[Tensor]:
    hq, hkv = heads
    return [torch.randn(1, h, length, dim, **kind) for h in (hq, hkv, hkv, hq)]


def expected(q: Tensor, k: Tensor, v: Tensor, do: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """From the exact reference in float64, with a dense mask."""
    lo, hi = pattern.bounds()
    at = torch.arange(pattern.length)
    mask = ((at >= lo[..., None]) & (at < hi[..., None]))[:, None].to(q.device)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = scaled_dot_product_attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), do.double())


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "gathered"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_add_up(name: str, ranks: int, ring: bool) -> None:
    pattern = Pattern(130, 1, **PATTERNS[name])
    q, k, v, do = inputs(130, (4, 2), 8, dtype=torch.float64)
    for got, want in zip(spread(q, k, v, do, pattern, ranks, ring), expected(q, k, v, do, pattern)):
        assert relative_error(got, want) < 1e-12


class ReadsLse:
    """A backend whose backward is a flash kernel's: probabilities from the log-sum-exp that it is given."""

    name = "cudnn"
    gives_lse = True
    reads_lse = True

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        assert grad_lse is None
        group = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
        scores = (call.q @ k.mT) * call.scale
        seen = masks.visibility(call)
        p = torch.exp(scores - lse[..., None])
        p = p if seen is None else p.masked_fill(~seen, 0)
        ds = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * call.scale
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ call.q, p.mT @ grad_out))
        return Gradients(ds @ k, dk, dv)


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "gathered"])
@pytest.mark.parametrize("name", ["causal", "full", "window"])
def test_a_backward_that_reads_the_log_sum_exp_is_given_the_whole_rows(
    name: str, ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], serve.route

    def route(call: Call, names: tuple[str, ...]) -> Any:
        calls.append(call)
        backend: Any = ReadsLse()
        return Route(Problem.of(call), backend, backend)

    # Only where a share of the gradients is computed: forwards go their usual way.
    monkeypatch.setattr(
        serve, "route", lambda call, names, **how: route(call, names) if call.grads else real(call, names, **how)
    )
    monkeypatch.setattr(serve, "count", lambda name, backward=False: None)
    pattern = Pattern(130, 1, **PATTERNS[name])
    q, k, v, do = inputs(130, (4, 2), 8, dtype=torch.float64)
    found = spread(q, k, v, do, pattern, 3, ring)
    monkeypatch.undo()
    assert calls
    for got, want in zip(found, expected(q, k, v, do, pattern)):
        assert relative_error(got, want) < 1e-12


def outputs_to_merge(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.randn(2, 33, 3, 24, device=device).transpose(1, 2)
    other = torch.randn(2, 3, 33, 24, device=device, dtype=dtype)
    lse, other_lse = torch.randn(2, 3, 33, device=device), torch.randn(2, 33, 3, device=device).transpose(1, 2)
    lse[:, 0, :9] = -torch.inf
    other_lse[:, :, 5:20] = -torch.inf
    out[:, 0, :9] = 0
    other[:, :, 5:20] = 0
    return out, lse, other, other_lse


def merged_plainly(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.exp(lse.double()), torch.exp(other_lse.double())
    total = a + b
    found = (out.double() * a[..., None] + other.double() * b[..., None]) / total.clamp(min=1e-300)[..., None]
    return found, total.log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype: torch.dtype) -> None:
    out, lse, other, other_lse = outputs_to_merge("cpu", dtype)
    want, want_lse = merged_plainly(out, lse, other, other_lse)
    merge_(out, lse, other, other_lse)
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(lse, want_lse.float())


def parts_to_merge(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of three ranks, sinks, and what they make."""
    out, lse = torch.randn(3, 2, 4, 5, 24, device=device), torch.randn(3, 2, 4, 5, device=device)
    lse[0, :, 0] = -torch.inf
    lse[:, 1, 1] = -torch.inf  # nowhere anything
    out[lse == -torch.inf] = 0
    sinks = torch.randn(4, device=device)
    weights = torch.exp(lse.double())
    total = weights.sum(0)
    want = (out.double() * weights[..., None]).sum(0) / total.clamp(min=1e-300)[..., None]
    return torch.cat([out, lse[..., None]], -1), sinks, want, total


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("by_kernel", [False, True], ids=["torch", "kernel"])
def test_merging_all(by_kernel: bool, with_sinks: bool) -> None:
    device = "cuda" if torch.cuda.is_available() and by_kernel else "cpu"
    parts, sinks, want, total = parts_to_merge(device)
    if with_sinks:
        whole = total + torch.exp(sinks.double())[:, None]
        want, total = want * (total / whole)[..., None], whole
    chosen = sinks if with_sinks else None
    if by_kernel:
        pytest.importorskip("triton")
        from fastattn.parallel.merge_kernel import launch_all

        out, lse = torch.empty(2, 5, 4, 24, device=device).transpose(1, 2), torch.empty(2, 4, 5, device=device)
        launch_all(parts, chosen, out, lse)
    else:
        out, lse = merge_all(parts, chosen, torch.float32)
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(lse, total.log().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merging_kernel(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert device == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
    from fastattn.parallel.merge_kernel import launch

    out, lse, other, other_lse = outputs_to_merge(device, dtype)
    want, want_lse = merged_plainly(out, lse, other, other_lse)
    launch(out[:, :, 3:31], lse[:, :, 3:31], other[:, :, 3:31], other_lse[:, :, 3:31])
    torch.testing.assert_close(out[:, :, 3:31], want[:, :, 3:31].float())
    torch.testing.assert_close(lse[:, :, 3:31], want_lse[:, :, 3:31].float())


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "gathered"])
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_on_a_gpu(name: str, ring: bool) -> None:
    """bfloat16, on cuDNN where it is there."""
    length = 1000
    scaled = {n: tuple((r, a * 7, b * 7) for r, a, b in x) if n == "segments" else x for n, x in PATTERNS[name].items()}
    pattern = Pattern(length, 1, **scaled)
    q, k, v, do = inputs(length, (8, 2), 64, dtype=torch.bfloat16, device="cuda")
    found = spread(q, k, v, do, pattern, 4, ring)
    limits = (4e-3, 4e-3, 8e-3, 8e-3, 8e-3)
    for got, want, limit in zip(found, expected(q, k, v, do, pattern), limits):
        finite = torch.isfinite(want)
        assert torch.equal(got.double()[~finite], want[~finite])
        assert float((got.double() - want)[finite].norm() / want[finite].norm()) < limit
