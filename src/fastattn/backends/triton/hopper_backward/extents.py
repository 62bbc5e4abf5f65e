"""Which tiles of queries see a block of keys, and which of its keys nobody sees: found on the device, from bounds.

Plain Triton, launched after the kernel of `bounds.py`. The memory that it fills, in int32 numbers, for B batch entries
of N blocks of keys and T tiles of queries:

    0       [B, N, 4]     per block: the first tile that sees a key of it, one past the last (0, 0: none does); not 0
                          where some key of it is seen by no query; unused
            [B, T]        per tile: not 0 where some query sees no key. `prepare.py` writes it
            [B, N, KEYS]  per key: not 0 where some query sees it
            [B, H, T]     with biases of keys, in place of [B, T]: what a query sees differs from head to head then
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bounds_kernel import FIELDS, HEADER

_FAR = tl.constexpr(1 << 30)
EXTENTS_INTEGERS = ["kv_len", "tiles"]


def size(batch: int, tiles: int, blocks: int, keys: int) -> int:
    """Of the memory, in numbers."""
    return batch * (4 * blocks + tiles + keys * blocks)


@triton.jit(do_not_specialize=EXTENTS_INTEGERS)
def extents_kernel(
    bounds_ptr,  # int32
    extents_ptr,  # int32
    kv_len,
    tiles,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,  # tiles that are looked at together
):
    """One block of keys of one batch entry."""
    n = tl.program_id(0)
    b = tl.program_id(1)
    blocks = tl.num_programs(0)
    batch = tl.num_programs(1)
    key = n * KEYS + tl.arange(0, KEYS)
    fields = bounds_ptr + HEADER + b.to(tl.int64) * tiles * FIELDS
    first = _FAR
    end = 0
    seen = tl.zeros([KEYS], tl.int32)
    least = _FAR  # of the keys that these tiles see
    most = 0
    for start in range(0, tiles, CHUNK):
        t = start + tl.arange(0, CHUNK)
        at = fields + t * FIELDS
        lo = tl.load(at, mask=t < tiles, other=0)
        hi = tl.load(at + 1, mask=t < tiles, other=0)
        hit = (lo < hi) & (hi > n * KEYS) & (lo < n * KEYS + KEYS)
        first = tl.minimum(first, tl.min(tl.where(hit, t, _FAR), 0))
        end = tl.maximum(end, tl.max(tl.where(hit, t + 1, 0), 0))
        # Keys that all queries of a tile see that see any.
        common_lo = tl.load(at + 2, mask=t < tiles, other=0)
        common_hi = tl.load(at + 3, mask=t < tiles, other=0)
        by = hit[:, None] & (key[None, :] >= common_lo[:, None]) & (key[None, :] < common_hi[:, None])
        seen = tl.maximum(seen, tl.max(by.to(tl.int32), 0))
        least = tl.minimum(least, tl.min(tl.where(hit, lo, _FAR), 0))
        most = tl.maximum(most, tl.max(tl.where(hit, hi, 0), 0))
    first = tl.minimum(first, end)
    # Of the rest, query by query, whether one sees it. (Padding, beside all that they see, need not be asked for.)
    possible = ((key >= least) & (key < most)).to(tl.int32)
    left = tl.sum(possible * (1 - seen), 0)
    lo_rows = bounds_ptr + HEADER + batch.to(tl.int64) * tiles * FIELDS + b.to(tl.int64) * tiles * ROWS
    hi_rows = lo_rows + batch.to(tl.int64) * tiles * ROWS
    t = end - 1
    while (t >= first) & (left > 0):
        i = t * ROWS + tl.arange(0, ROWS)
        lo = tl.load(lo_rows + i)
        hi = tl.load(hi_rows + i)
        by = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        seen = tl.maximum(seen, tl.max(by.to(tl.int32), 0))
        left = tl.sum(possible * (1 - seen), 0)
        t -= 1
    block = b.to(tl.int64) * blocks + n
    tl.store(extents_ptr + block * 4, first)
    tl.store(extents_ptr + block * 4 + 1, end)
    tl.store(extents_ptr + block * 4 + 2, tl.sum((key < kv_len).to(tl.int32) * (1 - seen), 0))
    keys_ptr = extents_ptr + batch.to(tl.int64) * (blocks * 4 + tiles)
    tl.store(keys_ptr + block * KEYS + tl.arange(0, KEYS), seen)
