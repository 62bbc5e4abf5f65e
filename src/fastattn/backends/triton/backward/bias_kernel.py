"""The pass over an additive mask: one program computes one tile of the mask's gradient.

The gradient of a mask that is broadcast along a dim is the sum over that dim, which the program walks: batch entries
and heads, and blocks of queries or of keys. No matrix of scores exists, in memory, but the gradient itself; and no
atomics: bits repeat. Where the mask has few tiles, several programs share the walk, each of which writes a sum of its
own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import dot_rows, load_rows
from ..masking import mask_tile, visible_keys
from .prepare import UNIT as OUT_UNIT
from .scores import probabilities, score_gradient

#: Never specialised.
INTEGERS = [
    "q_sb", "q_sh", "q_si", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj", "do_sb", "do_sh", "do_si",
    "mask_sb", "mask_sh", "mask_si", "mask_sj", "mask_heads", "row_tiles", "key_tiles", "walk", "walk_heads",
    "walk_rows", "walk_keys", "walk_each", "batch", "heads", "group", "q_len", "kv_len", "left", "right",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,  # of `prepare_kernel`
    dmask_ptr,  # [parts, *the mask's shape], contiguous
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
    q_len,
    kv_len,
    left,
    right,
    inner,  # as in `keys_kernel`
    factor,
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
    apart = batch.to(tl.int64) * heads * q_len
    for step in range(begin, tl.minimum(begin + walk_each, walk)):
        n = step % walk_keys + key_tile
        rest = step // walk_keys
        m = rest % walk_rows + row_tile
        rest = rest // walk_rows
        head = (rest % walk_heads + mask_head).to(tl.int64)
        b = rest // walk_heads + mask_entry
        b64 = b.to(tl.int64)
        kv_head = head // group
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)
        j = n * BLOCK_N + tl.arange(0, BLOCK_N)
        i64 = i.to(tl.int64)
        j64 = j.to(tl.int64)
        valid = i < q_len
        inside = j < kv_len
        lo, hi = visible_keys(b, i, valid, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right)
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        there = valid[:, None] & inside[None, :] if MASK_ROWS else inside[None, :]
        at = mask_ptr + (b64 * mask_sb + head * mask_sh) * MASK_UNIT
        mask = mask_tile(at, i, j, there, mask_si, mask_sj, MASK_UNIT, MASK_ROWS, MASK_ADJACENT)
        stats = stats_ptr + (b64 * heads + head) * q_len + i
        lse = tl.load(stats, mask=valid, other=float("inf"))
        delta = tl.load(stats + apart, mask=valid, other=0.0)
        rest = tl.load(stats + 2 * apart, mask=valid, other=0.0)[:, None]
        q_at = (b64 * q_sb + head * q_sh + i64 * q_si) * UNIT
        q, q_rest = load_rows(q_ptr, q_at, valid, D, HEAD, HEAD_REST)
        k_at = (b64 * k_sb + kv_head * k_sh + j64 * k_sj) * UNIT
        k, k_rest = load_rows(k_ptr, k_at, inside, D, HEAD, HEAD_REST)
        do_at = (b64 * do_sb + head * do_sh + i64 * do_si) * OUT_UNIT
        do, do_rest = load_rows(do_ptr, do_at, valid, DV, VALUE, VALUE_REST)
        v_at = (b64 * v_sb + kv_head * v_sh + j64 * v_sj) * UNIT
        v, v_rest = load_rows(v_ptr, v_at, inside, DV, VALUE, VALUE_REST)
        s = dot_rows(q, q_rest, k, k_rest, HEAD_REST, PRECISION)
        dp = dot_rows(do, do_rest, v, v_rest, VALUE_REST, PRECISION)
        p, s, seen = probabilities(s, lse[:, None], rest, mask, seen, inner, factor, False, True, SOFTCAP)
        total += score_gradient(p, dp, delta[:, None], seen, False)

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
