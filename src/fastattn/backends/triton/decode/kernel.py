"""Split-KV attention for few queries ("flash decoding"): the kernel.

Decode is bound by the reading of K and V, so each key is read once: the queries of all heads that share a K/V head are
the rows of one tensor-core tile. Few rows are few programs, so the keys of a tile are divided among several programs
("splits"); each leaves its unfinished softmax and output. A second kernel (`combine.py`) combines them, or the last of
these programs to be done (`last.py`). Few rows of wide heads leave so much that one program would read it for longer
than a second launch takes: theirs has more programs (`combine_wide.py`), and the launch overlaps with what comes
before it (`MEANWHILE`).

More rows than one tile has room for are several blocks of rows. Those of few queries, whose heads alone fill a block
(absorbed MLA: 128 heads to a K/V head), and those of chunks (`chunks.py`), run side by side and find their keys in the
L2 cache when one of them has read them. (Those of many queries have one split: not what this is made for, but far
faster than the reference where no other kernel has the feature.)

Where the values are the keys' first columns, in memory too, each key is read once for both products (`SAME`).

Lengths are read on the device: each program finds the range of keys that any row of its tile sees and takes its share
of *that* range. Short rows finish early, and a launch does not depend on a length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import float_bias, tanh, visible_keys
from .last import combine_last

# Integers are never specialised: a kernel compiled for one length or layout serves all of them. Loads stay vectorised
# because the strides of q, k, v come in units of 8 elements (see `forward.py`).
_STRIDES = ["q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"]
_MASK_STRIDES = ["mask_sb", "mask_sh", "mask_si", "mask_sj", "interval_sb", "interval_si"]
_INTEGERS = [*_STRIDES, *_MASK_STRIDES, "q_len", "kv_len", "left", "right"]


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=_INTEGERS)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    scratch_ptr,  # None: the only split, writes out and lse; else see `combine.py`
    counters_ptr,  # int32, 0, of each tile; None: a second kernel combines
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
    FIRST: tl.constexpr,  # columns of the parts of head dims (`tile_parts.py`)
    REST: tl.constexpr,
    FIRST_V: tl.constexpr,
    REST_V: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of q's, k's and v's strides
    GAPS: tl.constexpr,  # between the first and the last visible key may lie keys that no row of the tile sees
    NEAR: tl.constexpr,  # blocks of rows come one after the other in the grid, else last
    LARGE: tl.constexpr,  # tiles of wide heads or many rows: see the loop
    SAME: tl.constexpr,  # v is k's first columns: v_ptr and its strides are not looked at
    MEANWHILE: tl.constexpr,  # this kernel is launched while the one before it still runs, and waits for its end
    COMBINED_ROWS: tl.constexpr,  # that the last program combines at a time
    COMBINED_COLUMNS: tl.constexpr,
    COMBINED_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
):
    BOUNDS: tl.constexpr = lo_ptr is not None or q_lengths_ptr is not None or kv_lengths_ptr is not None
    if MEANWHILE and BOUNDS:  # they are the first that is read
        tl.extra.cuda.gdc_wait()
    # Exponents of 2 spare one product of three a score. (Times log2(e) a bias of the least float32 would be -inf; and
    # tiles of wide heads would spill.)
    BASE_2: tl.constexpr = LARGE and mask_ptr is None and FIRST + REST <= 256 and FIRST_V + REST_V <= 256
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if NEAR:
        blocks = (q_len * GROUP + BLOCK_M - 1) // BLOCK_M
        tile = tl.program_id(0) // blocks
        tiles = tl.num_programs(0) // blocks
        block = tl.program_id(0) % blocks
    else:  # the last goes first: under a causal mask it has the most to do
        tile = tl.program_id(0)
        tiles = tl.num_programs(0)
        block = tl.num_programs(2) - 1 - tl.program_id(2)
    b = tile // KV_HEADS
    kv_head = tile % KV_HEADS
    b64 = b.to(tl.int64)

    # Rows run over the heads of one query first: so does the output's memory, and neighbours see the same keys.
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // GROUP
    head = kv_head * GROUP + r % GROUP
    valid = i < q_len

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
    if LARGE:
        inner_lo = tl.max(tl.where(valid, lo, 0), 0)
        inner_hi = tl.min(tl.where(valid, hi, kv_len), 0)
        # One step at least, if of nothing: where there may be none, the assembler cannot leave the output in the
        # registers of Hopper's products, and puts all products one after the other.
        end = tl.maximum(stop, start + 1)
        tl.assume(start < end)
    else:
        end = stop

    if MEANWHILE and not BOUNDS:
        tl.extra.cuda.gdc_wait()
    q_at = (b64 * q_sb + head.to(tl.int64) * q_sh + i.to(tl.int64) * q_si) * UNIT
    q, q_rest = load_rows(q_ptr, q_at, valid, D, FIRST, REST)
    k_ptr += (b64 * k_sb + kv_head.to(tl.int64) * k_sh) * UNIT
    v_ptr += (b64 * v_sb + kv_head.to(tl.int64) * v_sh) * UNIT
    if mask_ptr is not None:
        mask_ptr += b64 * mask_sb
        mask_at = head.to(tl.int64) * mask_sh + i.to(tl.int64) * mask_si

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the row's greatest score so far
    l = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(score - m)
    if scratch_ptr is None and sinks_ptr is not None:  # a sink is a score whose value is 0
        m = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
        if BASE_2:
            m *= _LOG2_E
        l = tl.where(m > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, FIRST_V], tl.float32)
    acc_rest = acc
    if REST_V > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_V], tl.float32)

    exponent = _LOG2_E
    if BASE_2 and softcap is None:  # the scale, which is positive, is applied with the difference to the maximum
        exponent = scale * _LOG2_E
        scale = 1.0
    for step in range(start, end, BLOCK_N):
        j = step + tl.arange(0, BLOCK_N)
        j64 = j.to(tl.int64)
        # Columns padded in D hold 0 in q and k both: 0 in q alone would make NaN of an infinite key.
        k, k_rest = load_rows(k_ptr, j64 * k_sj * UNIT, j < stop, D, FIRST, REST)
        if LARGE:  # two products that do not meet before their end: see below
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if REST > 0:
                s += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION) * scale
        else:
            s = dot_rows(q, q_rest, k, k_rest, REST, PRECISION) * scale
        if softcap is not None:
            s = softcap * tanh(s / softcap)
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if mask_ptr is not None:
            bias = tl.load(mask_ptr + mask_at[:, None] + (j64 * mask_sj)[None, :], mask=seen, other=0)
            if mask_ptr.dtype.element_ty == tl.int1:
                seen = seen & bias
            else:
                bias = float_bias(bias)
                seen = seen & (bias > float("-inf"))
                # The least float32 is a legal bias. (Hence exp: scores times log2(e) for exp2 would make it -inf.)
                s += bias
        # Whatever a key that the row does not see holds, its score ends here.
        if LARGE:
            # Beside saving work, the branch hides from Triton that a product leads to another one: it would spread the
            # warps over the rows alone, and of 64 rows two groups of warps would compute the same scores.
            if (step < inner_lo) | (step + BLOCK_N > inner_hi) | (mask_ptr is not None):
                s = tl.where(seen, s, float("-inf"))
        else:
            s = tl.where(seen, s, float("-inf"))

        top = tl.max(s, 1)
        if BASE_2:
            top *= exponent
        m_new = tl.maximum(m, top)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        if BASE_2:
            p = tl.exp2(s * exponent - base[:, None])
            decay = tl.exp2(m - base)
        else:
            p = tl.exp(s - base[:, None])
            decay = tl.exp(m - base)
        m = m_new
        l = l * decay + tl.sum(p, 1)

        if SAME:
            v = k
            v_rest = k_rest
        else:
            v, v_rest = load_rows(v_ptr, j64 * v_sj * UNIT, j < stop, DV, FIRST_V, REST_V)
        if GAPS:  # p is 0 in them, but 0 * NaN is not
            anyone = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]
            v = tl.where(anyone, v, 0.0)
            if REST_V > 0:
                v_rest = tl.where(anyone, v_rest, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        if REST_V > 0:
            acc_rest = tl.dot(p.to(v.dtype), v_rest, acc_rest * decay[:, None], input_precision=PRECISION)

    if BASE_2:
        m *= _LN_2
    if scratch_ptr is None:
        total = tl.where(l == 0.0, 1.0, l)
        out_at = ((b64 * q_len + i) * (KV_HEADS * GROUP) + head) * DV
        out, out_rest = acc / total[:, None], acc_rest / total[:, None]
        store_rows(out_ptr, out_at, valid, out, out_rest, DV, FIRST_V, REST_V)
        if lse_ptr is not None:
            lse = m + tl.log(total)  # m is -inf where l is 0
            tl.store(lse_ptr + (b64 * (KV_HEADS * GROUP) + head) * q_len + i, lse, mask=valid)
    else:
        count = q_len * GROUP
        parts = tiles.to(tl.int64) * splits * count
        part = (tile.to(tl.int64) * splits + split) * count + r
        # Without work: no acc, only the l of 0 that makes the combine kernel stop short of it.
        written = r < tl.where(start < stop, count, 0)
        store_rows(scratch_ptr, part * DV, written, acc, acc_rest, DV, FIRST_V, REST_V)
        tl.store(scratch_ptr + parts * DV + part, m, mask=valid)
        tl.store(scratch_ptr + parts * (DV + 1) + part, l, mask=valid)
        if counters_ptr is not None:
            combine_last(
                scratch_ptr,
                counters_ptr + tile,
                out_ptr,
                lse_ptr,
                sinks_ptr,
                tile,
                tiles,
                splits,
                tl.minimum(steps, splits),
                q_len,
                KV_HEADS,
                GROUP,
                DV,
                COMBINED_ROWS,
                COMBINED_COLUMNS,
                COMBINED_SPLITS,
            )
