"""Attention sinks around a softmax that was computed without them.

cuDNN's own sink tensor cannot be had with heads folded into the batch, nor with one query, and its ragged backward
reads out of bounds (before 9.26). None of it is needed: a sink is one more term in the denominator,

    lse' = log(exp(lse) + exp(sink)),    o' = o * exp(lse - lse'),

and a backward that is given (o', lse') needs to know no more: ds = p' * (do v^T - rowsum(do * o')) already holds for
the keys, and dsink = -sum over rows of exp(sink - lse') * rowsum(do * o').
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launcher import Launcher, launcher_for


def add_sinks(out: Tensor, stats: Tensor, sinks: Tensor) -> Tensor:
    """Adds the sinks to a forward, in one pass over the output.

    out: token-major `[B,H,S,D]`, D a multiple of 8, scaled in place. stats: log-sum-exp without sinks, `[B,H,S]`
    float32. sinks: `[H]`. Returns the log-sum-exp with sinks, `[B,H,S]` laid out as the one without; a row that sees
    nothing has the sink's.
    """
    lse = torch.empty_like(stats)
    sinks = sinks.contiguous()
    launcher_for(_adding, (out, stats, sinks, lse))((out, stats, sinks, lse))
    return lse


def _adding(out: Tensor, stats: Tensor, sinks: Tensor, lse: Tensor) -> Launcher:
    batch, heads, length, dim = out.shape
    block = _rows(dim)
    return Launcher(
        _add_sinks,
        (triton.cdiv(length, block), heads, batch),
        out.device,
        (length, dim // 8, heads, *(stride // 8 for stride in out.stride()[:3]), *stats.stride(), *lse.stride()),
        (triton.next_power_of_2(dim), block),
        num_warps=4,
    )


def sink_gradient(out: Tensor, grad_out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sinks, `[H]` in their dtype. lse: with sinks, `[B,H,S]`."""
    batch, heads, length, dim = out.shape
    blocks = triton.cdiv(length, _rows(dim))
    sinks = sinks.contiguous()
    partial = out.new_empty((heads, batch, blocks), dtype=torch.float32)
    tensors = out, grad_out, lse, sinks, partial
    launcher_for(_differentiating, tensors)(tensors)
    return partial.sum((1, 2)).to(sinks.dtype)  # in a fixed order: the same bits every time


def _differentiating(out: Tensor, grad_out: Tensor, lse: Tensor, sinks: Tensor, partial: Tensor) -> Launcher:
    _, heads, length, dim = out.shape
    return Launcher(
        _sink_gradient,
        (partial.shape[2], heads, partial.shape[1]),
        out.device,
        (length, dim, heads, *out.stride()[:3], *grad_out.stride(), *lse.stride()),
        (triton.next_power_of_2(dim), _rows(dim)),
        num_warps=4,
    )


def _rows(dim: int) -> int:
    """Of a program."""
    return 16 if dim > 128 else 32


@triton.jit(do_not_specialize=list(range(4, 16)))
def _add_sinks(  # type: ignore[no-untyped-def]
    out, stats, sinks, lse, length, dim, heads, o_b, o_h, o_s, w_b, w_h, w_s, l_b, l_h, l_s,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_b, o_h, o_s, dim = o_b * 8, o_h * 8, o_s * 8, dim * 8  # known multiples of 8 are read 16 bytes at a time
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    there = row < length
    without = tl.load(stats + batch * w_b + head * w_h + row.to(tl.int64) * w_s, mask=there, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    top = tl.maximum(without, sink)
    top = tl.where(top == float("-inf"), 0.0, top)  # a sink of -inf is no sink
    both = top + tl.log(tl.exp(without - top) + tl.exp(sink - top))
    tl.store(lse + batch * l_b + head * l_h + row.to(tl.int64) * l_s, both, mask=there)
    column = tl.arange(0, DIM)
    place = out + batch * o_b + head * o_h + row.to(tl.int64)[:, None] * o_s + column[None, :]
    inside = there[:, None] & (column < dim)[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(without == float("-inf"), 0.0, tl.exp(without - both))
    tl.store(place, (value * kept[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(range(5, 18)))
def _sink_gradient(  # type: ignore[no-untyped-def]
    out, grad_out, lse, sinks, partial, length, dim, heads, o_b, o_h, o_s, g_b, g_h, g_s, g_d, l_b, l_h, l_s,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.num_programs(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    head, batch, batches = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    there = row < length
    column = tl.arange(0, DIM)
    inside = there[:, None] & (column < dim)[None, :]
    at_row = row.to(tl.int64)
    at = at_row[:, None]
    o = tl.load(out + batch * o_b + head * o_h + at * o_s + column[None, :], mask=inside, other=0.0)
    g = tl.load(grad_out + batch * g_b + head * g_h + at * g_s + column[None, :] * g_d, mask=inside, other=0.0)
    # A row that sees nothing has output 0, whatever its upstream gradient holds.
    product = tl.where(o == 0.0, 0.0, o.to(tl.float32) * g.to(tl.float32))
    sink = tl.load(sinks + head).to(tl.float32)
    total = tl.load(lse + batch * l_b + head * l_h + at_row * l_s, mask=there, other=float("inf"))
    total = tl.where(total == float("-inf"), float("inf"), total)
    found = tl.sum(tl.exp(sink - total) * tl.sum(product, axis=1), axis=0)
    tl.store(partial + (head * batches + batch) * blocks + block, -found)
