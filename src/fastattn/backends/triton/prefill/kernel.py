"""Attention forward for many queries, in plain Triton: the kernel.

One program computes one block of query rows of one head. It walks the blocks of keys in two loops: first the blocks of
which every row sees every key ("full"), then those that a bound or a mask cuts ("partial"). (In this order: with the
masked loop first ptxas serialises the asynchronous products of the tensor cores.) A running softmax does not care in
which order the blocks come.

Which blocks those are follows from the bounds `[lo, hi)` of each row, or, with a tensor mask, from the lists that
`block_lists.py` makes. Every length and stride is data: one binary serves all shapes of a kind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import float_bias, mask_tile, tanh, visible_keys, whole_pieces
from ..walk import keys_to_visit, program_of, span_of
from .block_lists import HEADER

_STRIDES = ["q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"]
_MASK_STRIDES = ["mask_sb", "mask_sh", "mask_si", "mask_sj", "list_sb", "list_sh", "list_sm"]
_OTHERS = ["interval_sb", "interval_si", "heads", "group", "row_blocks", "q_len", "kv_len", "left", "right"]
#: Never specialised. Loads stay vectorised because strides come in units of `UNIT` and `MASK_UNIT` elements.
INTEGERS = [*_STRIDES, *_MASK_STRIDES, *_OTHERS]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _partial_start(lists_ptr, t, count, origin, before, end, BLOCK_N: tl.constexpr):
    """The first key of the partial block t of `count`; of the last one where there are no more."""
    if lists_ptr is not None:
        t = tl.maximum(tl.minimum(t, count - 1), 0)
        return tl.load(lists_ptr + HEADER + t, mask=t < count, other=0) * BLOCK_N
    else:
        return tl.where(t < before, origin + t * BLOCK_N, end + (t - before) * BLOCK_N)


@triton.jit
def _mask_of(
    mask_ptr, i, start, valid, last, mask_si, mask_sj,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """A block's entries of a tensor mask."""
    j = start + tl.arange(0, BLOCK_N)
    inside = (j < whole_pieces(last, UNIT))[None, :]
    there = valid[:, None] & inside if ROWS else inside
    return mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, UNIT, ROWS, ADJACENT)


@triton.jit
def _step(
    start,
    q,
    q_rest,
    m,
    l,
    acc,
    acc_rest,
    k_ptr,
    v_ptr,
    k_sj,
    v_sj,
    mask,  # entries of a tensor mask, [rows, keys] or [1, keys], or None
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
    BIASED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GAPS: tl.constexpr,
    V_IN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running softmax (m: a row's largest score, l: its sum of exponentials, acc) after one more block of keys."""
    j = start + tl.arange(0, BLOCK_N)
    if not FULL:
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        # Keys that no row of the block sees may hold anything, and 0 * NaN is not 0: they are not loaded.
        if GAPS:
            inside = tl.max(seen.to(tl.int32), 0) > 0
        else:
            inside = (j >= first) & (j < last)
    j64 = j.to(tl.int64)
    wanted = None if FULL else inside
    k, k_rest = load_rows(k_ptr, j64 * k_sj * UNIT, wanted, D, HEAD, HEAD_REST)
    s = dot_rows(q, q_rest, k, k_rest, HEAD_REST, PRECISION)
    if SOFTCAP:
        s = tanh(s * inner)
    if not FULL:
        if mask is not None:
            if BIASED:
                bias = float_bias(mask)
                seen = seen & (bias > float("-inf"))
                s = s * factor + bias
            else:
                seen = seen & mask
        # Whatever a key that the row does not see holds, its score ends here.
        s = tl.where(seen, s, float("-inf"))
    top = tl.max(s, 1)
    if not BIASED or FULL:
        top = top * factor
    m_new = tl.maximum(m, top)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
    if not BIASED:
        p = tl.exp2(s * factor - base[:, None])
        decay = tl.exp2(m - base)
    else:
        # A bias may be the least float32, which times log2(e) would be -inf: first the difference, then the factor.
        decay = tl.exp2((m - base) * _LOG2_E)
        if FULL:
            p = tl.exp2(s * (factor * _LOG2_E) - (base * _LOG2_E)[:, None])
        else:
            p = tl.exp2((s - base[:, None]) * _LOG2_E)
    l = l * decay + tl.sum(p, 1)
    if V_IN_K:
        v = k
        v_rest = k
    else:
        v, v_rest = load_rows(v_ptr, j64 * v_sj * UNIT, wanted, DV, VALUE, VALUE_REST)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * decay[:, None], input_precision=PRECISION)
    if VALUE_REST:
        acc_rest = tl.dot(p, v_rest, acc_rest * decay[:, None], input_precision=PRECISION)
    return m_new, l, acc, acc_rest


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    mask_ptr,
    lists_ptr,  # int32, see `block_lists.py`; None: every block between the rows' bounds
    lo_ptr,
    hi_ptr,
    sinks_ptr,
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
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    list_sb,
    list_sh,
    list_sm,
    interval_sb,
    interval_si,
    heads,  # of queries
    group,
    row_blocks,
    q_len,
    kv_len,
    left,
    right,
    inner,  # with a softcap: what scores are multiplied by before tanh
    factor,  # what scores (or their tanh) are multiplied by, > 0, to become exponents: of e if BIASED, else of 2
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
    BIASED: tl.constexpr,  # the mask is additive
    SOFTCAP: tl.constexpr,
    GAPS: tl.constexpr,  # between two keys that a block of rows sees may lie keys that none of its rows sees
    V_IN_K: tl.constexpr,  # v is k's first columns
    BY_HEAD: tl.constexpr,  # programs in the order of heads, for the L2 cache; else of row blocks, the longest first
    PRECISION: tl.constexpr,  # of float32 products
):
    bh, block = program_of(row_blocks, BY_HEAD)
    block = row_blocks - 1 - block  # under a causal mask the last has the most to do
    b = bh // heads
    head = bh - b * heads
    b64 = b.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < q_len

    lo, hi = visible_keys(
        b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
    )
    # Rows without a key may compute what they like: they are cleared at the end.
    sees, first, last = span_of(lo, hi, kv_len)
    if lists_ptr is not None:
        lists_ptr += b64 * list_sb + head.to(tl.int64) * list_sh + block.to(tl.int64) * list_sm
    begin, full, partial, origin, before, end = keys_to_visit(
        lists_ptr, mask_ptr, lo, hi, sees, first, last, kv_len, BLOCK_N
    )

    q_at = (b64 * q_sb + head.to(tl.int64) * q_sh + i.to(tl.int64) * q_si) * UNIT
    q, q_rest = load_rows(q_ptr, q_at, valid, D, HEAD, HEAD_REST)
    k_ptr += (b64 * k_sb + kv_head * k_sh) * UNIT
    v_ptr += (b64 * v_sb + kv_head * v_sh) * UNIT
    if mask_ptr is not None:
        mask_ptr += (b64 * mask_sb + head.to(tl.int64) * mask_sh) * MASK_UNIT

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, VALUE_REST if VALUE_REST else VALUE], tl.float32)
    for t in range(full):
        start = begin + t * BLOCK_N
        m, l, acc, acc_rest = _step(
            start, q, q_rest, m, l, acc, acc_rest, k_ptr, v_ptr, k_sj, v_sj, None, lo, hi, first, last,
            inner, factor, True, D, DV, BLOCK_N, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, BIASED,
            SOFTCAP, GAPS, V_IN_K, PRECISION,
        )  # fmt: skip
    bias = 0
    if mask_ptr is not None:
        start = _partial_start(lists_ptr, 0, partial, origin, before, end, BLOCK_N)
        bias = _mask_of(mask_ptr, i, start, valid, last, mask_si, mask_sj, BLOCK_N, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
    for t in range(partial):
        start = _partial_start(lists_ptr, t, partial, origin, before, end, BLOCK_N)
        mask = bias
        if mask_ptr is not None:  # of the next block, so that it is there when that begins
            after = _partial_start(lists_ptr, t + 1, partial, origin, before, end, BLOCK_N)
            bias = _mask_of(
                mask_ptr, i, after, valid, last, mask_si, mask_sj, BLOCK_N, MASK_UNIT, MASK_ROWS, MASK_ADJACENT
            )
        m, l, acc, acc_rest = _step(
            start, q, q_rest, m, l, acc, acc_rest, k_ptr, v_ptr, k_sj, v_sj, mask if mask_ptr is not None else None,
            lo, hi, first, last, inner, factor, False, D, DV, BLOCK_N, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, BIASED,
            SOFTCAP, GAPS, V_IN_K, PRECISION,
        )  # fmt: skip

    m = tl.where(sees, m, float("-inf"))
    l = tl.where(sees, l, 0.0)
    shrink = tl.where(sees, 1.0, 0.0)
    if sinks_ptr is not None:  # one more score, whose value is 0
        to_exponent: tl.constexpr = _LOG2_E if BIASED else 1.0
        sink = tl.load(sinks_ptr + head).to(tl.float32) * (_LOG2_E / to_exponent)
        top = tl.maximum(m, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2((m - base) * to_exponent)
        l = l * decay + tl.exp2((sink - base) * to_exponent)
        shrink *= decay
        m = top
    total = tl.where(l == 0.0, 1.0, l)
    shrink = (shrink / total)[:, None]
    # Not 0 * acc: acc of a row that is cleared may be NaN.
    acc = tl.where(sees[:, None], acc * shrink, 0.0)
    acc_rest = tl.where(sees[:, None], acc_rest * shrink, 0.0)
    store_rows(out_ptr, ((b64 * q_len + i) * heads + head) * DV, valid, acc, acc_rest, DV, VALUE, VALUE_REST)
    if lse_ptr is not None:
        if not BIASED:
            m = m * _LN_2
        lse = m + tl.log2(total) * _LN_2  # m is -inf where l is 0
        tl.store(lse_ptr + (b64 * heads + head) * q_len + i, lse, mask=valid)
