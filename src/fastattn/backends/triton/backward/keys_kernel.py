"""The pass over keys: one program computes dK and dV of one block of keys of one K/V head.

It walks the query heads of the group and the blocks of queries that see the keys: first those of which every query sees
every key ("full"), then those that a bound or a mask cuts ("partial"). Scores are held transposed, `[keys, queries]`:
so probabilities and their gradient are the left sides of the products that follow, which take them from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import float_bias, lengths_of, mask_tile, visible_keys
from ..walk import program_of
from .prepare import UNIT as OUT_UNIT
from .ranges import FIELDS, band_range
from .scores import before_softcap, probabilities, score_gradient

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "do_sb", "do_sh", "do_si",
    "mask_sb", "mask_sh", "mask_si", "mask_sj", "list_sb", "list_sh", "interval_sb", "interval_si",
    "batch", "kv_heads", "group", "heads_each", "key_blocks", "row_blocks", "q_len", "kv_len", "left", "right",
]  # fmt: skip


@triton.jit
def _step(
    row,  # the block's first query
    k,
    k_rest,
    v,
    v_rest,
    dk,
    dk_rest,
    dv,
    dv_rest,
    b,
    j,
    q_ptr,
    do_ptr,
    stats_ptr,
    apart,  # numbers from a row's log-sum-exp to its delta
    mask_ptr,  # None: nothing is read of a mask
    lo_ptr,
    hi_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    q_si,
    do_si,
    mask_si,
    mask_sj,
    interval_sb,
    interval_si,
    q_len,
    kv_len,
    left,
    right,
    last,
    inner,
    factor,
    FULL: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV after one more block of queries."""
    i = row + tl.arange(0, BLOCK_M)
    i64 = i.to(tl.int64)
    wanted = None
    seen = None
    mask = None
    rest = None
    stats_ptr += i
    if FULL:
        lse = tl.load(stats_ptr)
        delta = tl.load(stats_ptr + apart)
    else:
        valid = i < last
        lse = tl.load(stats_ptr, mask=valid, other=float("inf"))
        delta = tl.load(stats_ptr + apart, mask=valid, other=0.0)
        if BIASED:
            rest = tl.load(stats_ptr + 2 * apart, mask=valid, other=0.0)[None, :]
        lo, hi = visible_keys(
            b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left,
            right,
        )  # fmt: skip
        seen = (j[:, None] >= lo[None, :]) & (j[:, None] < hi[None, :])
        # Queries that see no key may hold anything, as may their dO, and 0 * NaN is not 0: they are not loaded.
        wanted = valid & (lse < float("inf")) if CHECKED else valid
        if mask_ptr is not None:
            inside = (j < kv_len)[None, :]
            there = valid[:, None] & inside if MASK_ROWS else inside
            mask = tl.trans(mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT))
    q, q_rest = load_rows(q_ptr, i64 * q_si * UNIT, wanted, D, HEAD, HEAD_REST)
    do, do_rest = load_rows(do_ptr, i64 * do_si * OUT_UNIT, wanted, DV, VALUE, VALUE_REST)
    s = dot_rows(k, k_rest, q, q_rest, HEAD_REST, PRECISION)
    if KEYS:
        dp = dot_rows(v, v_rest, do, do_rest, VALUE_REST, PRECISION)
    p, s, seen = probabilities(s, lse[None, :], rest, mask, seen, inner, factor, FULL, BIASED, SOFTCAP)
    if VALUES:
        weights = p.to(do.dtype)
        dv = tl.dot(weights, do, dv, input_precision=PRECISION)
        if VALUE_REST > 0:
            dv_rest = tl.dot(weights, do_rest, dv_rest, input_precision=PRECISION)
    if KEYS:
        ds = score_gradient(p, dp, delta[None, :], seen, FULL)
        ds = before_softcap(ds, s, seen, FULL, SOFTCAP).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if HEAD_REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=INTEGERS)
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # of `prepare_kernel`
    dk_ptr,  # [parts, B, Skv, Hkv, D], or None
    dv_ptr,  # [parts, B, Skv, Hkv, Dv], or None
    mask_ptr,
    lists_ptr,  # of `key_list_kernel`, or None
    ranges_ptr,  # of `range_kernel`, or None
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
    interval_sb,
    interval_si,
    batch,
    kv_heads,
    group,
    heads_each,  # query heads of one program: the group, or a part of it
    key_blocks,
    row_blocks,  # of the lists
    q_len,
    kv_len,
    left,
    right,
    inner,  # with a softcap: what scores are multiplied by before tanh
    factor,  # what scores (or their tanh) are multiplied by to become exponents: of e if BIASED, else of 2
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,  # the head dim in two parts: see `tile_parts.py`
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of q's, k's and v's strides
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,  # the mask is not the same for all queries
    MASK_ADJACENT: tl.constexpr,
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHECKED: tl.constexpr,  # between queries that see a key of the block may lie some that see no key at all
    BY_HEAD: tl.constexpr,  # programs in the order of heads; else of blocks, those that most queries see first
    PRECISION: tl.constexpr,
):
    unit, block = program_of(key_blocks, BY_HEAD)
    parts = group // heads_each
    bh = unit // parts
    part = unit - bh * parts
    b = bh // kv_heads
    kv_head = bh - b * kv_heads
    b64 = b.to(tl.int64)
    head64 = kv_head.to(tl.int64)
    start = block * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    queries, keys = lengths_of(b, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len)
    if ranges_ptr is not None:
        at = ranges_ptr + (b64 * key_blocks + block) * FIELDS
        first = tl.load(at)
        last = tl.load(at + 1)
        full_first = tl.load(at + 2)
        full_last = tl.load(at + 3)
    else:
        first, last, full_first, full_last = band_range(start, queries, keys, left, right, BLOCK_N)
    first_head = kv_head * group + part * heads_each
    if mask_ptr is not None:
        mask_ptr += b64 * mask_sb * MASK_UNIT
        full = 0 * block
        before = 0 * block
        if not MASK_ROWS:  # keys that no query of the head sees: nothing to do, if there is one mask for all heads
            if mask_sh == 0:
                entries = mask_tile(mask_ptr, j, j, (j < kv_len)[None, :], 0, mask_sj, MASK_UNIT, False, MASK_ADJACENT)
                if BIASED:
                    shown = (float_bias(entries) > float("-inf")) & (j < kv_len)[None, :]
                    some = tl.max(tl.max(shown.to(tl.int32), 1), 0)
                else:
                    some = tl.max(tl.max(entries.to(tl.int32), 1), 0)
                last = last * some
    else:
        before = tl.maximum(full_first - first + BLOCK_M - 1, 0) // BLOCK_M
        full = tl.maximum(full_last - first - before * BLOCK_M, 0) // BLOCK_M
        before = tl.where(full > 0, before, 0)
    after = tl.maximum(last - first - (before + full) * BLOCK_M + BLOCK_M - 1, 0) // BLOCK_M
    partial = before + after

    # Keys of other blocks or beyond the last one give rows of their own, which are not stored.
    k_at = (b64 * k_sb + head64 * k_sh + j.to(tl.int64) * k_sj) * UNIT
    v_at = (b64 * v_sb + head64 * v_sh + j.to(tl.int64) * v_sj) * UNIT
    k, k_rest = load_rows(k_ptr, k_at, j < keys, D, HEAD, HEAD_REST)
    v, v_rest = load_rows(v_ptr, v_at, j < keys, DV, VALUE, VALUE_REST)
    q_ptr += (b64 * q_sb + first_head.to(tl.int64) * q_sh) * UNIT
    do_ptr += (b64 * do_sb + first_head.to(tl.int64) * do_sh) * OUT_UNIT
    heads = (kv_heads * group).to(tl.int64)
    stats_ptr += (b64 * heads + first_head) * q_len
    apart = batch * heads * q_len
    dk = tl.zeros([BLOCK_N, HEAD], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, HEAD_REST if HEAD_REST else 16], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, VALUE_REST if VALUE_REST else 16], tl.float32)

    if mask_ptr is None:
        for t in range(full * heads_each):
            g = t // full
            row = first + (before + t - g * full) * BLOCK_M
            g = g.to(tl.int64)
            dk, dk_rest, dv, dv_rest = _step(
                row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j,
                q_ptr + g * q_sh * UNIT, do_ptr + g * do_sh * OUT_UNIT, stats_ptr + g * q_len, apart,
                None, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb,
                interval_si, q_len, kv_len, left, right, last, inner, factor, True, dk_ptr is not None,
                dv_ptr is not None, D, DV, BLOCK_M, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS,
                MASK_ADJACENT, BIASED, SOFTCAP, CHECKED, PRECISION,
            )  # fmt: skip
    if lists_ptr is None:
        for t in range(partial * heads_each):
            g = t // partial
            t = t - g * partial
            row = first + tl.where(t < before, t, t + full) * BLOCK_M
            g = g.to(tl.int64)
            masked = None
            if mask_ptr is not None:
                masked = mask_ptr + (first_head + g) * mask_sh * MASK_UNIT
            dk, dk_rest, dv, dv_rest = _step(
                row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j,
                q_ptr + g * q_sh * UNIT, do_ptr + g * do_sh * OUT_UNIT, stats_ptr + g * q_len, apart,
                masked, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb,
                interval_si, q_len, kv_len, left, right, last, inner, factor, False, dk_ptr is not None,
                dv_ptr is not None, D, DV, BLOCK_M, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS,
                MASK_ADJACENT, BIASED, SOFTCAP, CHECKED, PRECISION,
            )  # fmt: skip
    else:
        for h in range(heads_each):
            head = (first_head + h).to(tl.int64)
            list_ptr = lists_ptr + b64 * list_sb + head * list_sh + block.to(tl.int64) * (row_blocks + 1)
            g = (head - first_head).to(tl.int64)
            for t in range(tl.load(list_ptr)):
                row = tl.load(list_ptr + 1 + t) * BLOCK_M
                dk, dk_rest, dv, dv_rest = _step(
                    row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j,
                    q_ptr + g * q_sh * UNIT, do_ptr + g * do_sh * OUT_UNIT, stats_ptr + g * q_len, apart,
                    mask_ptr + head * mask_sh * MASK_UNIT, lo_ptr, hi_ptr, q_lengths_ptr,
                    kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb, interval_si, q_len, kv_len, left, right,
                    last, inner, factor, False, dk_ptr is not None, dv_ptr is not None, D, DV, BLOCK_M, HEAD,
                    HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BIASED, SOFTCAP, CHECKED,
                    PRECISION,
                )  # fmt: skip
    at = ((part * batch + b64) * kv_len + j) * kv_heads + kv_head
    if dk_ptr is not None:
        store_rows(dk_ptr, at * D, j < kv_len, dk * scale, dk_rest * scale, D, HEAD, HEAD_REST)
    if dv_ptr is not None:
        store_rows(dv_ptr, at * DV, j < kv_len, dv, dv_rest, DV, VALUE, VALUE_REST)
