"""The pass over keys: one step, which is one block of queries. Scores are held transposed, see `keys_kernel.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows
from ..masking import float_bias, mask_tile, visible_keys, whole_pieces
from .prepare import UNIT as OUT_UNIT
from .scores import before_softcap, probabilities, score_gradient


@triton.jit
def keys_step(
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
    entries,  # of a mask that all queries share and that adds something: [keys, 1], or None
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
    FULL: tl.constexpr,  # every query sees every key, as far as bounds go
    WHOLE: tl.constexpr,  # and there is no query that sees no key
    TILES: tl.constexpr,  # the block begins at a multiple of its size, so that there are statistics of all its rows
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
    mask = entries
    rest = None
    stats_ptr += i
    if TILES or WHOLE:
        lse = tl.load(stats_ptr)
        delta = tl.load(stats_ptr + apart)
        if BIASED:
            rest = tl.load(stats_ptr + 2 * apart)[None, :]
        valid = i < q_len
    else:
        valid = i < last
        lse = tl.load(stats_ptr, mask=valid, other=float("inf"))
        delta = tl.load(stats_ptr + apart, mask=valid, other=0.0)
        if BIASED:
            rest = tl.load(stats_ptr + 2 * apart, mask=valid, other=0.0)[None, :]
        wanted = valid
    if CHECKED and not WHOLE:
        # Queries that see no key may hold anything, as may their dO, and 0 * NaN is not 0: they are not loaded.
        wanted = lse < float("inf")
    if not FULL:
        lo, hi = visible_keys(
            b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left,
            right,
        )  # fmt: skip
        seen = (j[:, None] >= lo[None, :]) & (j[:, None] < hi[None, :])
    if mask_ptr is not None:
        inside = (j < whole_pieces(kv_len, MASK_UNIT))[None, :]
        there = valid[:, None] & inside if MASK_ROWS else inside
        mask = mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
        if BIASED:  # before it is transposed, which takes fewer registers
            mask = float_bias(mask)
        mask = tl.trans(mask)
    q, q_rest = load_rows(q_ptr, i64 * q_si * UNIT, wanted, D, HEAD, HEAD_REST)
    do, do_rest = load_rows(do_ptr, i64 * do_si * OUT_UNIT, wanted, DV, VALUE, VALUE_REST)
    s = dot_rows(k, k_rest, q, q_rest, HEAD_REST, PRECISION)
    p, s = probabilities(s, lse[None, :], rest, mask, seen, inner, factor, BIASED, SOFTCAP)
    if VALUES:
        weights = p.to(do.dtype)
        dv = tl.dot(weights, do, dv, input_precision=PRECISION)
        if VALUE_REST > 0:
            dv_rest = tl.dot(weights, do_rest, dv_rest, input_precision=PRECISION)
    if KEYS:  # not before the scores have become weights: both take many registers
        dp = dot_rows(v, v_rest, do, do_rest, VALUE_REST, PRECISION)
        ds = score_gradient(p, dp, delta[None, :], seen)
        ds = before_softcap(ds, s, seen, SOFTCAP).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if HEAD_REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv, dv_rest
