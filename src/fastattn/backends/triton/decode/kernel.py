"""Split-KV attention for few queries ("flash decoding"): the kernel.

Decode is bound by the reading of K and V, so each key is read once: the queries of all heads that share a K/V head are
the rows of one tensor-core tile. Few rows are few programs, so the keys of a tile are divided among several programs
("splits"); each leaves its unfinished softmax and output, and a second kernel (`combine.py`) combines them.

(More queries than one tile has room for are several blocks of rows, with one split: not what this is made for, but far
faster than the reference where no other kernel has the feature.)

Lengths are read on the device: each program finds the range of keys that any row of its tile sees and takes its share
of *that* range. Short rows finish early, and a launch does not depend on a length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import tanh, visible_keys

# Integers are never specialised: a kernel compiled for one length or layout serves all of them. Loads stay vectorised
# because the strides of q, k, v come in units of 8 elements (see `forward.py`).
_STRIDES = ["q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"]
_MASK_STRIDES = ["mask_sb", "mask_sh", "mask_si", "mask_sj", "interval_sb", "interval_si"]
_INTEGERS = [*_STRIDES, *_MASK_STRIDES, "q_len", "kv_len", "left", "right"]


@triton.jit(do_not_specialize=_INTEGERS)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    scratch_ptr,  # None: the only split, writes out and lse; else see `combine.py`
    mask_ptr,
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
    interval_sb,
    interval_si,
    q_len,
    kv_len,
    left,
    right,
    scale,
    softcap,  # None: off
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of q's, k's and v's strides
    GAPS: tl.constexpr,  # between the first and the last visible key may lie keys that no row of the tile sees
    PRECISION: tl.constexpr,  # of float32 products
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = tile // KV_HEADS
    kv_head = tile % KV_HEADS
    b64 = b.to(tl.int64)

    # Rows run over the heads of one query first: so does the output's memory, and neighbours see the same keys.
    # Of several blocks of rows the last goes first: under a causal mask it has the most to do.
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // GROUP
    head = kv_head * GROUP + r % GROUP
    valid = i < q_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    lo, hi = visible_keys(
        b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
    )
    first = tl.min(tl.where(hi > lo, lo, kv_len), 0)
    last = tl.max(tl.where(hi > lo, hi, 0), 0)
    # Steps are dealt out evenly, the first splits taking one more; the splits with work come before those without.
    steps = (tl.maximum(last - first, 0) + BLOCK_N - 1) // BLOCK_N
    share = steps // splits
    extra = steps % splits
    start = first + (split * share + tl.minimum(split, extra)) * BLOCK_N
    stop = tl.minimum(start + (share + (split < extra).to(tl.int32)) * BLOCK_N, last)
    hi = tl.minimum(hi, stop)

    q_at = (b64 * q_sb + head.to(tl.int64) * q_sh + i.to(tl.int64) * q_si) * UNIT
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += (b64 * k_sb + kv_head.to(tl.int64) * k_sh) * UNIT
    v_ptr += (b64 * v_sb + kv_head.to(tl.int64) * v_sh) * UNIT
    if mask_ptr is not None:
        mask_ptr += b64 * mask_sb
        mask_at = head.to(tl.int64) * mask_sh + i.to(tl.int64) * mask_si

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's greatest score so far
    l = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(score - m)
    if scratch_ptr is None and sinks_ptr is not None:  # a sink is a score whose value is 0
        m = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
        l = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    for step in range(start, stop, BLOCK_N):
        j = step + tl.arange(0, BLOCK_N)
        j64 = j.to(tl.int64)
        # Columns padded in D hold 0 in q and k both: 0 in q alone would make NaN of an infinite key.
        k_mask = (d < D)[:, None] & (j < stop)[None, :]
        k = tl.load(k_ptr + (j64 * k_sj * UNIT)[None, :] + d[:, None], mask=k_mask, other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if softcap is not None:
            s = softcap * tanh(s / softcap)
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if mask_ptr is not None:
            bias = tl.load(mask_ptr + mask_at[:, None] + (j64 * mask_sj)[None, :], mask=seen, other=0)
            if mask_ptr.dtype.element_ty == tl.int1:
                seen = seen & bias
            else:
                if mask_ptr.dtype.element_ty == tl.float64:  # what is finite must stay so in float32
                    bias = tl.where(bias > float("-inf"), tl.maximum(bias, -3.4028234663852886e38), bias)
                bias = bias.to(tl.float32)
                seen = seen & (bias > float("-inf"))
                # The least float32 is a legal bias. (Hence exp: scores times log2(e) for exp2 would make it -inf.)
                s += bias
        # Whatever a key that the row does not see holds, its score ends here.
        s = tl.where(seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        p = tl.exp(s - base[:, None])
        decay = tl.exp(m - base)
        m = m_new
        l = l * decay + tl.sum(p, 1)

        v_mask = (j < stop)[:, None] & (dv < DV)[None, :]
        v = tl.load(v_ptr + (j64 * v_sj * UNIT)[:, None] + dv[None, :], mask=v_mask, other=0.0)
        if GAPS:  # p is 0 in them, but 0 * NaN is not
            v = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)

    if scratch_ptr is None:
        total = tl.where(l == 0.0, 1.0, l)
        out_at = ((b64 * q_len + i) * (KV_HEADS * GROUP) + head) * DV
        tl.store(
            out_ptr + out_at[:, None] + dv[None, :],
            (acc / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (dv < DV)[None, :],
        )
        if lse_ptr is not None:
            lse = m + tl.log(total)  # m is -inf where l is 0
            tl.store(lse_ptr + (b64 * (KV_HEADS * GROUP) + head) * q_len + i, lse, mask=valid)
    else:
        count = q_len * GROUP
        parts = tl.num_programs(0).to(tl.int64) * splits * count
        part = (tile.to(tl.int64) * splits + split) * count + r
        # Without work: no acc, only the l of 0 that makes the combine kernel stop short of it.
        written = r < tl.where(start < stop, count, 0)
        acc_mask = written[:, None] & (dv < DV)[None, :]
        tl.store(scratch_ptr + part[:, None] * DV + dv[None, :], acc, mask=acc_mask)
        tl.store(scratch_ptr + parts * DV + part, m, mask=valid)
        tl.store(scratch_ptr + parts * (DV + 1) + part, l, mask=valid)
