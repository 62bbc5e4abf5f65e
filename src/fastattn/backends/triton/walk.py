"""Which block of a tensor a program has, and which blocks of keys a block of queries visits: shared by the kernels in
plain Triton that walk over keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_of(blocks, BY_HEAD: tl.constexpr):
    """This program's head of a batch entry, counted through, and its block of `blocks`. BY_HEAD: programs go from head
    to head, else from block to block."""
    pid = tl.program_id(0)
    if BY_HEAD:
        head = pid // blocks
        block = pid - head * blocks
    else:
        count = tl.num_programs(0) // blocks
        block = pid // count
        head = pid - block * count
    return head, block


@triton.jit
def span_of(lo, hi, kv_len):
    """Of rows that see `[lo, hi)`: which see a key, the first key that one sees, and one past the last."""
    sees = hi > lo
    return sees, tl.min(tl.where(sees, lo, kv_len), 0), tl.max(tl.where(sees, hi, 0), 0)


@triton.jit
def keys_to_visit(lists_ptr, mask_ptr, lo, hi, sees, first, last, kv_len, BLOCK_N: tl.constexpr):
    """The blocks of keys for rows that see `[lo, hi)`: `full` ones from key `begin` on, of which every row sees every
    key, and `partial` ones, at `origin` and after, then at `end` and after.

    lists_ptr: this block of rows' list, see `prefill/block_lists.py`, which then says where the partial ones are; None:
    every block between the rows' bounds. sees, first, last: as of `span_of`. Returns begin, full, partial, origin, how
    many partial ones lie before the full, and end.
    """
    if lists_ptr is not None:
        begin = tl.load(lists_ptr) * BLOCK_N
        full = tl.load(lists_ptr + 1)
        partial = tl.load(lists_ptr + 2)
        origin = begin  # nobody looks at these three
        before = begin
        end = begin
    else:
        origin = first
        if mask_ptr is not None:
            origin = first // BLOCK_N * BLOCK_N  # where a mask is loaded in wide pieces
        before = (tl.max(tl.where(sees, lo, 0), 0) - origin + BLOCK_N - 1) // BLOCK_N  # partial blocks before the full
        begin = origin + before * BLOCK_N
        full = tl.maximum(tl.min(tl.where(sees, hi, kv_len), 0) - begin, 0) // BLOCK_N
        if mask_ptr is not None:
            full = full * 0
        before = tl.where(full > 0, before, 0)
        begin = origin + before * BLOCK_N
        partial = tl.maximum(last - begin - full * BLOCK_N + BLOCK_N - 1, 0) // BLOCK_N + before
        end = begin + full * BLOCK_N
    return begin, full, partial, origin, before, end
