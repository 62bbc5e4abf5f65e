"""The pass over keys: one program computes dK and dV of one block of keys of one K/V head.

It walks the query heads of the group and the blocks of queries that see the keys: first those of which every query sees
every key ("full"), then those that a bound or a mask cuts ("partial"). Scores are held transposed, `[keys, queries]`:
so probabilities and their gradient are the left sides of the products that follow, which take them from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import load_rows, store_rows
from ..masking import float_bias, lengths_of, mask_tile, whole_pieces
from ..walk import program_of
from .keys_step import keys_step
from .prepare import STAT_ROWS
from .prepare import UNIT as OUT_UNIT
from .ranges import FIELDS, LIST_HEADER, band_range

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "do_sb", "do_sh", "do_si",
    "mask_sb", "mask_sh", "mask_si", "mask_sj", "list_sb", "list_sh", "interval_sb", "interval_si",
    "batch", "kv_heads", "group", "heads_each", "key_blocks", "row_blocks", "stat_blocks", "q_len", "kv_len", "left",
    "right",
]  # fmt: skip


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
    stat_blocks,
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
    MASK_HEADS: tl.constexpr,  # the mask is not the same for all heads of a group
    BOUNDED: tl.constexpr,  # not the mask alone says which keys a row sees
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
    entries = None
    shared: tl.constexpr = mask_ptr is not None and not MASK_ROWS and not MASK_HEADS
    tiles: tl.constexpr = mask_ptr is not None and not shared
    if mask_ptr is not None:
        mask_ptr += b64 * mask_sb * MASK_UNIT
    if shared:  # one row of a mask for all that this program meets
        at = mask_ptr + first_head.to(tl.int64) * mask_sh * MASK_UNIT
        inside = (j < whole_pieces(kv_len, MASK_UNIT))[None, :]
        shown = tl.trans(mask_tile(at, j, j, inside, 0, mask_sj, MASK_UNIT, False, MASK_ADJACENT))
        if BIASED:
            entries = float_bias(shown)
            shown = entries > float("-inf")
        # Keys that no query sees: nothing to do.
        last = last * tl.max(tl.max((shown & (j < kv_len)[:, None]).to(tl.int32), 1), 0)
    if tiles:
        first = first // BLOCK_M * BLOCK_M
        full = 0 * block
        before = 0 * block
    else:
        first = first // 2 * 2  # statistics are loaded in pairs
        before = tl.maximum(full_first - first + BLOCK_M - 1, 0) // BLOCK_M
        full = tl.maximum(tl.minimum(full_last, last) - first - before * BLOCK_M, 0) // BLOCK_M
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
    stats = stat_blocks.to(tl.int64) * STAT_ROWS
    stats_ptr += (b64 * heads + first_head) * stats
    apart = batch * heads * stats
    dk = tl.zeros([BLOCK_N, HEAD], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, HEAD_REST if HEAD_REST else 16], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, VALUE_REST if VALUE_REST else 16], tl.float32)

    if not tiles:
        for t in range(full * heads_each):
            g = t // full
            row = first + (before + t - g * full) * BLOCK_M
            g = g.to(tl.int64)
            dk, dk_rest, dv, dv_rest = keys_step(
                row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j, entries, q_ptr + g * q_sh * UNIT, do_ptr + g
                * do_sh * OUT_UNIT, stats_ptr + g * stats, apart, None, lo_ptr, hi_ptr, q_lengths_ptr,
                kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb, interval_si, q_len, kv_len, left, right,
                last, inner, factor, True, True, tiles, dk_ptr is not None, dv_ptr is not None, D, DV, BLOCK_M, HEAD,
                HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BIASED, SOFTCAP, CHECKED,
                PRECISION,
            )  # fmt: skip
    if lists_ptr is None:
        for t in range(partial * heads_each):
            g = t // partial
            t = t - g * partial
            row = first + tl.where(t < before, t, t + full) * BLOCK_M
            g = g.to(tl.int64)
            masked = None
            if tiles:
                masked = mask_ptr + (first_head + g) * mask_sh * MASK_UNIT
            dk, dk_rest, dv, dv_rest = keys_step(
                row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j, entries, q_ptr + g * q_sh * UNIT, do_ptr + g
                * do_sh * OUT_UNIT, stats_ptr + g * stats, apart, masked, lo_ptr, hi_ptr,
                q_lengths_ptr, kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb, interval_si, q_len, kv_len,
                left, right, last, inner, factor, not BOUNDED, False, tiles, dk_ptr is not None, dv_ptr is not None, D,
                DV, BLOCK_M, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BIASED,
                SOFTCAP, CHECKED, PRECISION,
            )  # fmt: skip
    else:
        for h in range(heads_each):
            head = (first_head + h).to(tl.int64)
            list_ptr = lists_ptr + b64 * list_sb + head * list_sh + block.to(tl.int64) * (row_blocks + LIST_HEADER)
            g = (head - first_head).to(tl.int64)
            full = tl.load(list_ptr)
            partial = tl.load(list_ptr + 1)
            for t in range(full):
                row = tl.load(list_ptr + LIST_HEADER + t) * BLOCK_M
                dk, dk_rest, dv, dv_rest = keys_step(
                    row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j, entries, q_ptr + g * q_sh * UNIT, do_ptr
                    + g * do_sh * OUT_UNIT, stats_ptr + g * stats, apart, None, lo_ptr, hi_ptr,
                    q_lengths_ptr, kv_lengths_ptr, q_si, do_si, mask_si, mask_sj, interval_sb, interval_si, q_len,
                    kv_len, left, right, last, inner, factor, True, False, tiles, dk_ptr is not None, dv_ptr is not
                    None, D, DV, BLOCK_M, HEAD, HEAD_REST, VALUE, VALUE_REST, UNIT, MASK_UNIT, MASK_ROWS,
                    MASK_ADJACENT, BIASED, SOFTCAP, CHECKED, PRECISION,
                )  # fmt: skip
            for t in range(partial):
                row = tl.load(list_ptr + LIST_HEADER + full + t) * BLOCK_M
                dk, dk_rest, dv, dv_rest = keys_step(
                    row, k, k_rest, v, v_rest, dk, dk_rest, dv, dv_rest, b, j, entries, q_ptr + g * q_sh * UNIT, do_ptr
                    + g * do_sh * OUT_UNIT, stats_ptr + g * stats, apart, mask_ptr + head * mask_sh *
                    MASK_UNIT, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, q_si, do_si, mask_si, mask_sj,
                    interval_sb, interval_si, q_len, kv_len, left, right, last, inner, factor, not BOUNDED, False,
                    tiles, dk_ptr is not None, dv_ptr is not None, D, DV, BLOCK_M, HEAD, HEAD_REST, VALUE, VALUE_REST,
                    UNIT, MASK_UNIT, MASK_ROWS, MASK_ADJACENT, BIASED, SOFTCAP, CHECKED, PRECISION,
                )  # fmt: skip
    if shared and not BIASED:
        dk = tl.where(shown, dk, 0.0)
        dv = tl.where(shown, dv, 0.0)
        dk_rest = tl.where(shown, dk_rest, 0.0)
        dv_rest = tl.where(shown, dv_rest, 0.0)
    at = ((part * batch + b64) * kv_len + j) * kv_heads + kv_head
    if dk_ptr is not None:
        store_rows(dk_ptr, at * D, j < kv_len, dk * scale, dk_rest * scale, D, HEAD, HEAD_REST)
    if dv_ptr is not None:
        store_rows(dv_ptr, at * DV, j < kv_len, dv, dv_rest, DV, VALUE, VALUE_REST)
