"""The pass over queries: one program computes dQ of one block of queries of one head.

It walks the blocks of keys as the forward does (`prefill/kernel.py`): first those of which every query sees every key
("full"), then those that a bound or a mask cuts ("partial").
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import mask_tile, visible_keys, whole_pieces
from ..prefill.block_lists import HEADER
from ..walk import keys_to_visit, program_of, span_of
from .prepare import STAT_ROWS
from .prepare import UNIT as OUT_UNIT
from .scores import before_softcap, probabilities, score_gradient

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "do_sb", "do_sh", "do_si",
    "mask_sb", "mask_sh", "mask_si", "mask_sj", "list_sb", "list_sh", "list_sm", "interval_sb", "interval_si",
    "batch", "heads", "group", "row_blocks", "stat_blocks", "q_len", "kv_len", "left", "right",
]  # fmt: skip


@triton.jit
def _step(
    start,  # the block's first key
    q,
    q_rest,
    do,
    do_rest,
    lse,
    rest,  # as for `probabilities`
    delta,
    dq,
    dq_rest,
    i,
    valid,
    k_ptr,
    v_ptr,
    mask_ptr,
    k_sj,
    v_sj,
    mask_si,
    mask_sj,
    lo,
    hi,
    first,
    last,
    inner,
    factor,
    FULL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    BOUNDED: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ after one more block of keys."""
    j = start + tl.arange(0, BLOCK_N)
    seen = None
    wanted = None
    mask = None
    if not FULL:
        # Keys that no row of the block sees may hold anything, and 0 * NaN is not 0: they are not loaded.
        wanted = j < last
        if BOUNDED:
            seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
            wanted = tl.max(seen.to(tl.int32), 0) > 0 if GAPS else wanted & (j >= first)
        if mask_ptr is not None:
            inside = (j < whole_pieces(last, MASK_UNIT))[None, :]
            there = valid[:, None] & inside if MASK_ROWS else inside
            mask = mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
    j64 = j.to(tl.int64)
    k, k_rest = load_rows(k_ptr, j64 * k_sj * UNIT, wanted, D, HEAD, HEAD_REST)
    v, v_rest = load_rows(v_ptr, j64 * v_sj * UNIT, wanted, DV, VALUE, VALUE_REST)
    s = dot_rows(q, q_rest, k, k_rest, HEAD_REST, PRECISION)
    dp = dot_rows(do, do_rest, v, v_rest, VALUE_REST, PRECISION)
    p, s = probabilities(s, lse[:, None], rest, mask, seen, inner, factor, BIASED, SOFTCAP)
    ds = score_gradient(p, dp, delta[:, None], seen)
    ds = before_softcap(ds, s, seen, SOFTCAP).to(k.dtype)
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if HEAD_REST > 0:
        dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit(do_not_specialize=INTEGERS)
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # of `prepare_kernel`
    dq_ptr,  # [B, Sq, Hq, D]
    mask_ptr,
    lists_ptr,  # of `prefill/block_lists.py`, or None
    lo_ptr,
    hi_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    q_sb,
    q_sh,
    q_si,
    k_sb,
    k_sh,
    k_sj,
    v_sb,
    v_sh,
    v_sj,
    do_sb,
    do_sh,
    do_si,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    list_sb,
    list_sh,
    list_sm,
    interval_sb,
    interval_si,
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
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,  # the head dim in two parts: see `tile_parts.py`
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    BOUNDED: tl.constexpr,  # not the mask alone says which keys a row sees
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAPS: tl.constexpr,  # between two keys that a block of rows sees may lie keys that none of its rows sees
    BY_HEAD: tl.constexpr,  # programs in the order of heads; else of blocks, those that probably see most first
    PRECISION: tl.constexpr,
):
    bh, block = program_of(row_blocks, BY_HEAD)
    block = row_blocks - 1 - block
    b = bh // heads
    head = bh - b * heads
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i64 = i.to(tl.int64)
    valid = i < q_len
    lo, hi = visible_keys(
        b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
    )
    sees, first, last = span_of(lo, hi, kv_len)
    if lists_ptr is not None:
        lists_ptr += b64 * list_sb + head64 * list_sh + block.to(tl.int64) * list_sm
    begin, full, partial, origin, before, end = keys_to_visit(
        lists_ptr, mask_ptr, lo, hi, sees, first, last, kv_len, BLOCK_N
    )

    q, q_rest = load_rows(q_ptr, (b64 * q_sb + head64 * q_sh + i64 * q_si) * UNIT, valid, D, HEAD, HEAD_REST)
    do_at = (b64 * do_sb + head64 * do_sh + i64 * do_si) * OUT_UNIT
    do, do_rest = load_rows(do_ptr, do_at, valid, DV, VALUE, VALUE_REST)
    stats = stat_blocks.to(tl.int64) * STAT_ROWS
    stats_ptr += (b64 * heads + head) * stats
    lse = tl.load(stats_ptr + i)
    apart = batch * heads * stats
    delta = tl.load(stats_ptr + apart + i)
    k_ptr += (b64 * k_sb + kv_head * k_sh) * UNIT
    v_ptr += (b64 * v_sb + kv_head * v_sh) * UNIT
    if mask_ptr is not None:
        mask_ptr += (b64 * mask_sb + head64 * mask_sh) * MASK_UNIT
    dq = tl.zeros([BLOCK_M, HEAD], tl.float32)
    dq_rest = tl.zeros([BLOCK_M, HEAD_REST if HEAD_REST else 16], tl.float32)
    for t in range(full):
        dq, dq_rest = _step(
            begin + t * BLOCK_N, q, q_rest, do, do_rest, lse, None, delta, dq, dq_rest, i, valid, k_ptr, v_ptr, None,
            k_sj, v_sj, mask_si, mask_sj, lo, hi, first, last, inner, factor, True, D, DV, BLOCK_N, HEAD, HEAD_REST,
            VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BOUNDED, BIASED, SOFTCAP, GAPS, PRECISION,
        )  # fmt: skip
    rest = None
    if BIASED:  # not before the full blocks, to which the mask adds nothing
        lse = tl.load(stats_ptr + 2 * apart + i)
        rest = tl.load(stats_ptr + 3 * apart + i)[:, None]
    for t in range(partial):
        if lists_ptr is not None:
            start = tl.load(lists_ptr + HEADER + t) * BLOCK_N
        else:
            start = tl.where(t < before, origin + t * BLOCK_N, end + (t - before) * BLOCK_N)
        dq, dq_rest = _step(
            start, q, q_rest, do, do_rest, lse, rest, delta, dq, dq_rest, i, valid, k_ptr, v_ptr, mask_ptr, k_sj,
            v_sj, mask_si, mask_sj, lo, hi, first, last, inner, factor, False, D, DV, BLOCK_N, HEAD, HEAD_REST, VALUE,
            VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BOUNDED, BIASED, SOFTCAP, GAPS, PRECISION,
        )  # fmt: skip
    # A row that sees nothing has dq of 0, but it may have met blocks, and its dO may hold anything.
    sees = sees & (lse < float("inf"))
    dq = tl.where(sees[:, None], dq * scale, 0.0)
    dq_rest = tl.where(sees[:, None], dq_rest * scale, 0.0)
    store_rows(dq_ptr, ((b64 * q_len + i) * heads + head) * D, valid, dq, dq_rest, D, HEAD, HEAD_REST)
