"""Which blocks of queries a block of keys has to visit: the kernels that find it where it is data.

With a band and lengths it follows from a key's position (`band_range`). Intervals are searched, once for all heads
(`range_kernel`). Of a tensor mask with rows the blocks that `prefill/block_states.py` classified are listed the other
way round (`key_list_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import visible_keys
from ..prefill.block_states import FULL, PARTIAL
from .launch_config import KEY_LIST_HEADER, RANGE_FIELDS

#: Never specialised.
RANGE_INTEGERS = ["interval_sb", "interval_si", "key_blocks", "q_len", "kv_len", "left", "right"]
LIST_INTEGERS = ["row_blocks", "key_blocks"]
FIELDS = tl.constexpr(RANGE_FIELDS)
LIST_HEADER = tl.constexpr(KEY_LIST_HEADER)


@triton.jit
def band_range(start, queries, keys, left, right, BLOCK_N: tl.constexpr):
    """Of the keys from `start` on, under a band: the queries `[first, last)` that see one, each of which sees one, and
    those `[full_first, full_last)` that see all."""
    shift = keys - queries
    first = tl.maximum(start - shift - right, 0)
    last = tl.minimum(tl.minimum(start + BLOCK_N, keys) - shift + left, queries)
    last = tl.where(start < keys, last, 0)
    full_first = tl.maximum(start + BLOCK_N - 1 - shift - right, 0)
    full_last = tl.minimum(start - shift + left + 1, queries)
    full_last = tl.where(start + BLOCK_N <= keys, full_last, 0)
    return first, last, full_first, full_last


@triton.jit(do_not_specialize=RANGE_INTEGERS)
def range_kernel(
    ranges_ptr,  # int32 [B, key blocks, FIELDS]: first, last, full_first, full_last as of `band_range`
    lo_ptr,
    hi_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    interval_sb,
    interval_si,
    key_blocks,
    q_len,
    kv_len,
    left,
    right,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # in one step
):
    """One block of keys of one batch entry."""
    b = tl.program_id(0) // key_blocks
    block = tl.program_id(0) - b * key_blocks
    start = block * BLOCK_N
    end = tl.minimum(start + BLOCK_N, kv_len)
    first = q_len + 0 * start
    last = 0 * start
    full_first = q_len + 0 * start
    full_last = q_len + 0 * start
    for begin in range(0, q_len, ROWS):
        i = begin + tl.arange(0, ROWS)
        lo, hi = visible_keys(
            b, i, i < q_len, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len,
            left, right,
        )  # fmt: skip
        some = (lo < hi) & (lo < end) & (hi > start)
        all_of_it = (lo <= start) & (hi >= start + BLOCK_N)
        first = tl.minimum(first, tl.min(tl.where(some, i, q_len), 0))
        last = tl.maximum(last, tl.max(tl.where(some, i + 1, 0), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(all_of_it, i, q_len), 0))
        full_last = tl.minimum(full_last, tl.min(tl.where((all_of_it == 0) & (i > full_first), i, q_len), 0))
    at = ranges_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    tl.store(at, first)
    tl.store(at + 1, last)
    tl.store(at + 2, full_first)
    tl.store(at + 3, full_last)


@triton.jit(do_not_specialize=LIST_INTEGERS)
def key_list_kernel(
    states_ptr,  # uint8 [lists, row blocks, key blocks] of `classify_kernel`
    lists_ptr,  # int32 [lists, key blocks, LIST_HEADER + row blocks]
    row_blocks,
    key_blocks,
    BLOCKS: tl.constexpr,  # in one step
):
    """One block of keys: how many blocks of rows are full, how many partial, and which, the full ones first."""
    entry = tl.program_id(0) // key_blocks
    block = tl.program_id(0) - entry * key_blocks
    states_ptr += entry.to(tl.int64) * row_blocks * key_blocks + block
    lists_ptr += tl.program_id(0).to(tl.int64) * (row_blocks + LIST_HEADER)
    count = 0 * block
    for kind in tl.static_range(2):
        before = count
        for begin in range(0, row_blocks, BLOCKS):
            m = begin + tl.arange(0, BLOCKS)
            state = tl.load(states_ptr + m.to(tl.int64) * key_blocks, mask=m < row_blocks, other=0)
            listed = (state == (FULL if kind == 0 else PARTIAL)).to(tl.int32)
            tl.store(lists_ptr + (LIST_HEADER - 1) + count + tl.cumsum(listed, 0), m, mask=listed > 0)
            count += tl.sum(listed, 0)
        tl.store(lists_ptr + kind, count - before)
