"""Merging in one kernel. torch's own operations read and write a ring step's output three times, up to a tenth of its
attention's time; in a decode step they are ten small kernels, which take as long as its collective."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  #: of a program


def launch(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """`merge.merge_`: out and lse are changed in place. Any strides, but the last dim of out and other contiguous."""
    batch, heads, rows, dim = out.shape
    if not out.numel():
        return
    wide = triton.next_power_of_2(dim)
    block = max(1, _ELEMENTS // wide)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _merge_kernel[(triton.cdiv(rows, block), batch * heads)](
            out,
            lse,
            other,
            other_lse,
            *out.stride()[:3],
            *lse.stride(),
            *other.stride()[:3],
            *other_lse.stride(),
            rows,
            heads,
            DIM=dim,
            WIDE=wide,
            BLOCK=block,
        )


def launch_all(parts: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """`merge.merge_all`: parts `[N, B, H, S, D + 1]` contiguous, the last column the log-sum-exp; out `[B, H, S, D]` of
    any strides but the last, in any dtype; lse `[B, H, S]` contiguous."""
    count, batch, heads, rows, columns = parts.shape
    if not out.numel():
        return
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _merge_all_kernel[(batch * heads * rows,)](
            parts,
            sinks,
            out,
            lse,
            *out.stride()[:3],
            heads,
            rows,
            COUNT=count,
            MANY=triton.next_power_of_2(count),
            DIM=columns - 1,
            WIDE=triton.next_power_of_2(columns - 1),
        )


@triton.jit(do_not_specialize=["rows"])
def _merge_all_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    sinks_ptr,  # or None
    out_ptr,
    lse_ptr,
    out_b,
    out_h,
    out_s,
    heads,
    rows,
    COUNT: tl.constexpr,
    MANY: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row of all parts."""
    row = tl.program_id(0).to(tl.int64)
    b, h, s = row // (heads * rows), row // rows % heads, row % rows
    n = tl.arange(0, MANY).to(tl.int64)
    d = tl.arange(0, WIDE)
    at = parts_ptr + (n * tl.num_programs(0) + row) * (DIM + 1)
    each = tl.load(at + DIM, mask=n < COUNT, other=float("-inf"))
    top = tl.max(each, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(each.dtype)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen anywhere
    weights = tl.exp(each - base)
    total = tl.sum(weights, 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - base)
    total = tl.where(top == float("-inf"), 1.0, total)
    x = tl.load(at[:, None] + d[None, :], mask=(n < COUNT)[:, None] & (d < DIM)[None, :], other=0.0)
    found = tl.sum(weights[:, None] * x, 0) / total
    tl.store(out_ptr + b * out_b + h * out_h + s * out_s + d, found, mask=d < DIM)
    tl.store(lse_ptr + row, tl.where(top == float("-inf"), top, base + tl.log(total)))


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    out_b,
    out_h,
    out_s,
    lse_b,
    lse_h,
    lse_s,
    other_b,
    other_h,
    other_s,
    other_lse_b,
    other_lse_h,
    other_lse_s,
    rows,
    heads,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows of one head."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDE)
    there = s < rows
    cells = there[:, None] & (d < DIM)[None, :]
    lse_at = lse_ptr + b * lse_b + h * lse_h + s * lse_s
    mine = tl.load(lse_at, mask=there, other=0.0)
    its = tl.load(other_lse_ptr + b * other_lse_b + h * other_lse_h + s * other_lse_s, mask=there, other=0.0)
    top = tl.maximum(mine, its)
    base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen on either side
    a, c = tl.exp(mine - base), tl.exp(its - base)
    total = tl.where(top == float("-inf"), 1.0, a + c)
    weight = c / total
    # Where a program has more threads than rows, several of them hold a row: none may write before all have read.
    tl.debug_barrier()
    tl.store(lse_at, tl.where(top == float("-inf"), top, base + tl.log(total)), mask=there)
    out_at = out_ptr + b * out_b + h * out_h + s[:, None] * out_s + d[None, :]
    x = tl.load(out_at, mask=cells, other=0.0)
    y = tl.load(other_ptr + b * other_b + h * other_h + s[:, None] * other_s + d[None, :], mask=cells, other=0.0)
    tl.store(out_at, x + weight[:, None] * (y.to(x.dtype) - x), mask=cells)
