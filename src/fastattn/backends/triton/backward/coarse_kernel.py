"""The softmax of rows whose log-sum-exp is too large a number to have room for it, found again before the passes.

Where a mask adds finfo.min, or -1e9, to every key of a row (padding, as many models write it), the row still sees all
of them, but float32 has no bits left for log(n) beside such a number: exp(x - lse) would be 1 of each of n keys. Of
these rows the log-sum-exp is taken apart here: into the largest score, and the logarithm of the sum beside that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows
from ..masking import float_bias, mask_tile, tanh, visible_keys, whole_pieces
from ..prefill.block_lists import HEADER
from ..walk import keys_to_visit, program_of, span_of
from .prepare import STAT_ROWS
from .scores import LOG2_E

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "mask_sb", "mask_sh", "mask_si", "mask_sj", "list_sb", "list_sh",
    "list_sm", "batch", "heads", "group", "row_blocks", "stat_blocks", "q_len", "kv_len", "left", "right",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def coarse_kernel(
    q_ptr,
    k_ptr,
    stats_ptr,  # of `prepare_kernel`; of coarse rows the third and the fourth number are replaced
    mask_ptr,
    lists_ptr,  # of `prefill/block_lists.py`, or None
    sinks_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    q_sb,
    q_sh,
    q_si,
    k_sb,
    k_sh,
    k_sj,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    list_sb,
    list_sh,
    list_sm,
    batch,
    heads,  # of queries
    group,
    row_blocks,
    stat_blocks,
    q_len,
    kv_len,
    left,
    right,
    inner,  # as in `keys_kernel`
    factor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_REST: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COARSE: tl.constexpr,  # a log-sum-exp beyond this, either way, has too few bits after the point
    PRECISION: tl.constexpr,
):
    """One block of rows of one head. Where none of them is coarse it reads their log-sum-exp and is done."""
    bh, block = program_of(row_blocks, True)
    b = bh // heads
    head = bh - b * heads
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i64 = i.to(tl.int64)
    stats = stat_blocks.to(tl.int64) * STAT_ROWS
    stats_ptr += (b64 * heads + head) * stats + i
    lse = tl.load(stats_ptr)
    coarse = (tl.abs(lse) > COARSE) & (lse < float("inf"))
    some = tl.max(coarse.to(tl.int32), 0)

    lo, hi = visible_keys(b, i, coarse, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right)
    sees, first, last = span_of(lo, hi, kv_len)
    if lists_ptr is not None:
        lists_ptr += b64 * list_sb + head64 * list_sh + block.to(tl.int64) * list_sm
    begin, full, partial, _origin, _before, _end = keys_to_visit(
        lists_ptr, mask_ptr, lo, hi, sees, first, last, kv_len, BLOCK_N
    )
    q, q_rest = load_rows(q_ptr, (b64 * q_sb + head64 * q_sh + i64 * q_si) * UNIT, coarse, D, HEAD, HEAD_REST)
    k_ptr += (b64 * k_sb + (head // group).to(tl.int64) * k_sh) * UNIT
    mask_ptr += (b64 * mask_sb + head64 * mask_sh) * MASK_UNIT
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for t in range((full + partial) * some):
        start = begin + t * BLOCK_N
        if lists_ptr is not None:
            listed = tl.load(lists_ptr + HEADER + tl.maximum(t - full, 0)) * BLOCK_N
            start = tl.where(t < full, start, listed)
        j = start + tl.arange(0, BLOCK_N)
        inside = (j >= first) & (j < last)
        pieces = (j < whole_pieces(last, MASK_UNIT))[None, :]
        there = coarse[:, None] & pieces if MASK_ROWS else pieces
        bias = float_bias(mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT))
        k, k_rest = load_rows(k_ptr, j.to(tl.int64) * k_sj * UNIT, inside, D, HEAD, HEAD_REST)
        s = dot_rows(q, q_rest, k, k_rest, HEAD_REST, PRECISION)
        if SOFTCAP:
            s = tanh(s * inner)
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]) & (bias > float("-inf"))
        x = tl.where(seen, s * factor + bias, float("-inf"))
        above = tl.maximum(top, tl.max(x, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # -inf - -inf is NaN
        total = total * tl.exp2((top - base) * LOG2_E) + tl.sum(tl.exp2((x - base[:, None]) * LOG2_E), 1)
        top = above
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        above = tl.maximum(top, sink)
        total = total * tl.exp2((top - above) * LOG2_E) + tl.exp2((sink - above) * LOG2_E)
        top = above
    stats_ptr += 2 * batch * heads * stats
    tl.store(stats_ptr, top, mask=coarse)
    tl.store(stats_ptr + batch * heads * stats, tl.log2(tl.maximum(total, 1.0)), mask=coarse)
