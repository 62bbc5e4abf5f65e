"""Attention forward under one tile of a mask that many batch entries share, in plain Triton: the kernel.

A window of a Swin transformer has 49 tokens, a bias for each head, and a thousand batch entries. There one tile of the
mask is as large as keys and values together, and laid out so that it can only be loaded entry by entry. So a program
has one head and one block of queries, loads their tile once, and walks over batch entries. All keys are in one block:
there is no running softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import float_bias, mask_tile, visible_keys, whole_pieces
from ..walk import span_of

_STRIDES = ["q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "mask_sh", "mask_si", "mask_sj"]
_OTHERS = ["heads", "group", "row_blocks", "batch", "entries", "q_len", "kv_len", "left", "right"]
#: Never specialised, as in `kernel.py`.
INTEGERS = [*_STRIDES, *_OTHERS]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=INTEGERS)
def batch_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    mask_ptr,  # [1, H|1, Sq, Skv], with a row for each query
    q_sb,
    q_sh,
    q_si,
    k_sb,
    k_sh,
    k_sj,
    v_sb,
    v_sh,
    v_sj,
    mask_sh,
    mask_si,
    mask_sj,
    heads,  # of queries
    group,
    row_blocks,
    batch,
    entries,  # of the batch, for one program
    q_len,
    kv_len,  # at most BLOCK_N
    left,
    right,
    factor,  # what scores are multiplied by, > 0, to become exponents of e
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,  # the head dim, padded
    VALUE: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of q's, k's and v's strides
    MASK_UNIT: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    STAGES: tl.constexpr,  # batch entries being loaded or computed
):
    # Heads of a batch entry lie side by side in memory: programs that run together read them together.
    part = tl.program_id(0) // heads
    head = tl.program_id(0) - part * heads
    share = part // row_blocks
    block = part - share * row_blocks
    kv_head = (head // group).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    valid = i < q_len

    lo, hi = visible_keys(0, i, valid, None, None, None, None, 0, 0, q_len, kv_len, left, right)
    sees, first, last = span_of(lo, hi, kv_len)
    seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    wanted = (j >= first) & (j < last)  # other keys may hold anything, and 0 * NaN is not 0
    there = valid[:, None] & (j < whole_pieces(kv_len, MASK_UNIT))[None, :]
    mask_ptr += head.to(tl.int64) * mask_sh * MASK_UNIT
    entry = mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, True, MASK_ADJACENT)
    if entry.dtype == tl.int1:
        bias = tl.where(seen & entry, 0.0, float("-inf"))
    else:
        bias = float_bias(entry)
        bias = tl.where(seen & (bias > float("-inf")), bias, float("-inf"))

    q_at = (head.to(tl.int64) * q_sh + i.to(tl.int64) * q_si) * UNIT
    k_at = (kv_head * k_sh + j.to(tl.int64) * k_sj) * UNIT
    v_at = (kv_head * v_sh + j.to(tl.int64) * v_sj) * UNIT
    out_at = (i.to(tl.int64) * heads + head) * DV
    begin = share * entries
    for n in tl.range(0, tl.minimum(entries, batch - begin), num_stages=STAGES):
        b64 = begin.to(tl.int64) + n
        q, _ = load_rows(q_ptr + b64 * q_sb * UNIT, q_at, valid, D, HEAD, 0)
        k, _ = load_rows(k_ptr + b64 * k_sb * UNIT, k_at, wanted, D, HEAD, 0)
        v, _ = load_rows(v_ptr + b64 * v_sb * UNIT, v_at, wanted, DV, VALUE, 0)
        s = dot_rows(q, q, k, k, 0, "ieee")
        # Whatever a key that the row does not see holds, its score ends here.
        s = tl.where(bias > float("-inf"), s * factor + bias, float("-inf"))
        m = tl.max(s, 1)
        base = tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is NaN
        # A bias may be the least float32, which times log2(e) would be -inf: first the difference, then the factor.
        p = tl.exp2((s - base[:, None]) * _LOG2_E)
        l = tl.sum(p, 1)
        total = tl.where(l == 0.0, 1.0, l)
        acc = tl.dot(p.to(v.dtype), v)
        acc = tl.where(sees[:, None], acc * (1.0 / total)[:, None], 0.0)
        store_rows(out_ptr + b64 * q_len * heads * DV, out_at, valid, acc, acc, DV, VALUE, 0)
        if lse_ptr is not None:
            lse = tl.where(sees, m + tl.log2(total) * _LN_2, float("-inf"))
            tl.store(lse_ptr + (b64 * heads + head) * q_len + i, lse, mask=valid)
