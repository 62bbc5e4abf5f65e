"""The pass over an additive mask: one program computes one tile of the mask's gradient.

The gradient of a mask that is broadcast along a dim is the sum over that dim, which the program walks: batch entries
and heads, and blocks of queries or of keys. No matrix of scores exists, in memory, but the gradient itself; and no
atomics: bits repeat. Where the mask has few tiles, several programs share the walk, each of which writes a sum of its
own.

Where one tile is all of the queries and keys (the windows of Swin), it computes the other gradients, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows, store_rows
from ..masking import mask_tile, visible_keys, whole_pieces
from .prepare import STAT_ROWS
from .prepare import UNIT as OUT_UNIT
from .scores import before_softcap, probabilities, score_gradient

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "do_sb", "do_sh", "do_si",
    "mask_sb", "mask_sh", "mask_si", "mask_sj", "mask_heads", "row_tiles", "key_tiles", "walk", "walk_heads",
    "walk_rows", "walk_keys", "walk_each", "batch", "heads", "group", "stat_blocks", "q_len", "kv_len", "left", "right",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # of `prepare_kernel`
    dmask_ptr,  # [parts, *the mask's shape], contiguous
    dq_ptr,  # [B, Sq, Hq, D], [B, Skv, Hkv, D] and [B, Skv, Hkv, Dv] if WHOLE, each of them or None
    dk_ptr,
    dv_ptr,
    mask_ptr,
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
    mask_heads,  # of the mask; 1: it is the same for all
    row_tiles,  # of the mask: 1 where it is the same for all queries
    key_tiles,
    walk,  # what is summed: batch entries x heads x blocks of rows x blocks of keys, each 1 where the mask has that dim
    walk_heads,
    walk_rows,
    walk_keys,
    walk_each,  # of one program
    batch,
    heads,
    group,
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
    HEAD: tl.constexpr,
    HEAD_REST: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    ENTRIES: tl.constexpr,  # a program walks batch entries alone, of a mask with rows and keys that is the same for all
    WHOLE: tl.constexpr,  # and a tile is all of an entry's queries and keys of a head: then this is the only pass
    BOUNDED: tl.constexpr,  # not the mask alone says which keys a row sees
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    key_tile = tile % key_tiles
    row_tile = tile // key_tiles % row_tiles
    entry = tile // key_tiles // row_tiles
    mask_head = entry % mask_heads
    mask_entry = entry // mask_heads
    begin = tl.program_id(1) * walk_each
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    stats = stat_blocks.to(tl.int64) * STAT_ROWS
    apart = batch * heads * stats
    head = mask_head.to(tl.int64)
    if ENTRIES:
        i = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (i < q_len)[:, None] & (j < whole_pieces(kv_len, MASK_UNIT))[None, :]
        mask_ptr += head * mask_sh * MASK_UNIT
        of_all = mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
    for step in range(begin, tl.minimum(begin + walk_each, walk)):
        b = step + mask_entry
        if not ENTRIES:
            n = step % walk_keys + key_tile
            outer = step // walk_keys
            m = outer % walk_rows + row_tile
            outer = outer // walk_rows
            head = (outer % walk_heads + mask_head).to(tl.int64)
            b = outer // walk_heads + mask_entry
            i = m * BLOCK_M + tl.arange(0, BLOCK_M)
            j = n * BLOCK_N + tl.arange(0, BLOCK_N)
        b64 = b.to(tl.int64)
        kv_head = head // group
        i64 = i.to(tl.int64)
        j64 = j.to(tl.int64)
        valid = i < q_len
        inside = j < kv_len
        seen = None
        if BOUNDED:
            lo, hi = visible_keys(
                b, i, valid, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right
            )  # fmt: skip
            seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
            if WHOLE:  # the keys that no row sees may hold anything, and 0 * NaN is not 0
                inside = tl.max(seen.to(tl.int32), 0) > 0
        elif not MASK_KEYS:
            seen = valid[:, None] & inside[None, :]
        if ENTRIES:
            mask = of_all
        else:
            pieces = (j < whole_pieces(kv_len, MASK_UNIT))[None, :]
            there = valid[:, None] & pieces if MASK_ROWS else pieces
            at = mask_ptr + (b64 * mask_sb + head * mask_sh) * MASK_UNIT
            mask = mask_tile(at, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
        row_stats = stats_ptr + (b64 * heads + head) * stats + i
        delta = tl.load(row_stats + apart)
        lse = tl.load(row_stats + 2 * apart)
        rest = tl.load(row_stats + 3 * apart)[:, None]
        alive = lse < float("inf")  # other rows and their dO may hold anything
        q_at = (b64 * q_sb + head * q_sh + i64 * q_si) * UNIT
        q, q_rest = load_rows(q_ptr, q_at, alive, D, HEAD, HEAD_REST)
        k_at = (b64 * k_sb + kv_head * k_sh + j64 * k_sj) * UNIT
        k, k_rest = load_rows(k_ptr, k_at, inside, D, HEAD, HEAD_REST)
        do_at = (b64 * do_sb + head * do_sh + i64 * do_si) * OUT_UNIT
        do, do_rest = load_rows(do_ptr, do_at, alive, DV, VALUE, VALUE_REST)
        v_at = (b64 * v_sb + kv_head * v_sh + j64 * v_sj) * UNIT
        v, v_rest = load_rows(v_ptr, v_at, inside, DV, VALUE, VALUE_REST)
        s = dot_rows(q, q_rest, k, k_rest, HEAD_REST, PRECISION)
        dp = dot_rows(do, do_rest, v, v_rest, VALUE_REST, PRECISION)
        p, s = probabilities(s, lse[:, None], rest, mask, seen, inner, factor, True, SOFTCAP)
        ds = score_gradient(p, dp, delta[:, None], seen)
        total += ds
        if WHOLE:
            ds = before_softcap(ds, s, seen, SOFTCAP).to(q.dtype)
            at_query = (b64 * q_len + i) * heads + head
            at_key = (b64 * kv_len + j) * heads + head
            if dq_ptr is not None:
                dq = tl.dot(ds, k, input_precision=PRECISION) * scale
                dq_rest = dq
                if HEAD_REST > 0:
                    dq_rest = tl.dot(ds, k_rest, input_precision=PRECISION) * scale
                store_rows(dq_ptr, at_query * D, valid, dq, dq_rest, D, HEAD, HEAD_REST)
            if dk_ptr is not None:
                columns = tl.trans(ds)
                dk = tl.dot(columns, q, input_precision=PRECISION) * scale
                dk_rest = dk
                if HEAD_REST > 0:
                    dk_rest = tl.dot(columns, q_rest, input_precision=PRECISION) * scale
                store_rows(dk_ptr, at_key * D, j < kv_len, dk, dk_rest, D, HEAD, HEAD_REST)
            if dv_ptr is not None:
                weights = tl.trans(p.to(do.dtype))
                dv = tl.dot(weights, do, input_precision=PRECISION)
                dv_rest = dv
                if VALUE_REST > 0:
                    dv_rest = tl.dot(weights, do_rest, input_precision=PRECISION)
                store_rows(dv_ptr, at_key * DV, j < kv_len, dv, dv_rest, DV, VALUE, VALUE_REST)

    rows = q_len if MASK_ROWS else 1
    columns = kv_len if MASK_KEYS else 1
    part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // key_tiles // row_tiles)
    dmask_ptr += (part + entry) * rows * columns
    i = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = dmask_ptr.dtype.element_ty
    if MASK_ROWS and MASK_KEYS:
        at = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(dmask_ptr + at, total.to(dtype), mask=(i < rows)[:, None] & (j < columns)[None, :])
    elif MASK_KEYS:
        tl.store(dmask_ptr + j, tl.sum(total, 0).to(dtype), mask=j < columns)
    elif MASK_ROWS:
        tl.store(dmask_ptr + i, tl.sum(total, 1).to(dtype), mask=i < rows)
    else:
        tl.store(dmask_ptr, tl.sum(tl.sum(total, 1), 0).to(dtype))
