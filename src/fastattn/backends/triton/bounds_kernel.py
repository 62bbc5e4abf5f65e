"""The kernels of `bounds.py`, which says what they fill."""

from __future__ import annotations

import triton
import triton.language as tl

from . import bounds
from .key_bias_kernel import narrowed
from .masking import visible_keys

HEADER = tl.constexpr(bounds.HEADER_NUMBERS)
FIELDS = tl.constexpr(bounds.TILE_NUMBERS)
_UNIT = tl.constexpr(64)  # keys; tiles whose numbers of keys differ by less keep their order, and so their keys in L2

_INTEGERS = [
    "table_sr", "table_sn", "table_rows", "interval_sb", "interval_si", "q_len", "kv_len", "left", "right", "count",
    "steps", "ranges_at", "ranges_sb", "ranges_heads",
]  # fmt: skip


@triton.jit
def _segment_keys(b, i, valid, table_ptr, table_sr, table_sn, table_rows, q_len, kv_len, left, right, count, steps):
    """The keys `[lo, hi)` that segments let the rows i of batch entry b see. Equals `masks.segment_bounds`.

    steps: at least log2(count + 1), rounded up.
    """
    # Of the segments, which are sorted, the last that begins at the row or before.
    here = b.to(tl.int64) * q_len + i
    q_row = table_rows % 2  # a table without batch entries is one row shorter: all its segments are in the first
    q_ptr = table_ptr + q_row * table_sr
    kv_ptr = table_ptr + (table_rows - 2) * table_sr
    first = i * 0
    end = first + count
    for _ in range(steps):
        middle = (first + end) // 2
        searching = first < end
        at = middle.to(tl.int64) * table_sn
        entry = tl.load(table_ptr + at, mask=first < end * q_row, other=0)
        start = tl.load(q_ptr + at, mask=searching, other=0)
        start = tl.minimum(tl.maximum(start, 0), q_len)
        before = searching & (entry.to(tl.int64) * q_len + start <= here)
        end = tl.where(searching & (before == 0), middle, end)
        first = tl.where(before, middle + 1, first)
    found = first > 0
    at = tl.maximum(first - 1, 0).to(tl.int64) * table_sn
    entry = tl.load(table_ptr + at, mask=first * q_row > 0, other=0)
    q_end = tl.load(q_ptr + table_sr + at, mask=found, other=0)
    lo = tl.load(kv_ptr + at, mask=found, other=0)
    hi = tl.load(kv_ptr + table_sr + at, mask=found, other=0)
    q_end = tl.minimum(tl.maximum(q_end, 0), q_len)
    lo = tl.minimum(tl.maximum(lo, 0), kv_len)
    hi = tl.minimum(tl.maximum(hi, 0), kv_len)
    position = i + (hi - q_end)  # the segment's last query stands on its last key
    lo = tl.maximum(lo, position - left)
    hi = tl.minimum(hi, position + right + 1)
    return lo, tl.where(valid & found & (entry == b) & (i < q_end), hi, 0)


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=_INTEGERS)
def bounds_kernel(
    memory_ptr,  # uint8, see above
    table_ptr,  # int32 [2|3|4|5, N], or None: Intervals, band and lengths
    lo_ptr,  # int32 [B|1, Sq|1], or None
    hi_ptr,
    q_lengths_ptr,  # int32 [B], or None
    kv_lengths_ptr,
    table_sr,
    table_sn,
    table_rows,
    interval_sb,
    interval_si,
    q_len,
    kv_len,
    left,  # of any size where the band is open there
    right,
    count,  # N
    steps,
    ranges_at,  # see `KeyBias`; ranges_heads 0: there is no tensor mask
    ranges_sb,
    ranges_heads,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of one batch entry."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.program_id(0)
    b = tl.program_id(1)
    tiles = tl.num_programs(0)
    i = t * TILE + tl.arange(0, TILE)
    valid = i < q_len
    if table_ptr is not None:
        lo, hi = _segment_keys(
            b, i, valid, table_ptr, table_sr, table_sn, table_rows, q_len, kv_len, left, right, count, steps
        )
    else:
        lo, hi = visible_keys(
            b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left,
            right,
        )  # fmt: skip
    numbers = memory_ptr.to(tl.pointer_type(tl.int32))
    biased = 0
    if ranges_heads > 0:
        lo, hi, biased = narrowed(lo, hi, numbers + ranges_at + b.to(tl.int64) * ranges_sb, ranges_heads)
    seeing = lo < hi
    lo = tl.where(seeing, lo, 0)
    hi = tl.where(seeing, hi, 0)
    tile = b.to(tl.int64) * tiles + t
    lo_rows = numbers + HEADER + tl.num_programs(1).to(tl.int64) * tiles * FIELDS + tile * TILE
    hi_rows = lo_rows + tl.num_programs(1).to(tl.int64) * tiles * TILE
    row = tl.arange(0, TILE)
    tl.store(lo_rows + row, lo)
    tl.store(hi_rows + row, hi)

    most = 2147483647
    least_lo = tl.min(tl.where(seeing, lo, most), 0)
    greatest_hi = tl.max(hi, 0)
    greatest_lo = tl.max(lo, 0)
    least_hi = tl.min(tl.where(seeing, hi, most), 0)
    # Row after row, the keys seen so far are one run as long as each row's overlap or touch it.
    highest = tl.associative_scan(hi, 0, _greater)
    lowest = tl.associative_scan(tl.where(seeing, lo, most), 0, _lesser)
    before = tl.maximum(row - 1, 0)
    highest = tl.gather(highest, before, 0)
    lowest = tl.gather(lowest, before, 0)
    apart = seeing & (row > 0) & (lowest < most) & ((lo > highest) | (hi < lowest))
    gaps = tl.max(apart.to(tl.int32), 0)
    some = greatest_hi > 0
    at = numbers + HEADER + tile * FIELDS
    tl.store(at, tl.where(some, least_lo, 0))
    tl.store(at + 1, greatest_hi)
    tl.store(at + 2, greatest_lo)
    tl.store(at + 3, tl.where(some, least_hi, 0))
    tl.store(at + 4, gaps)
    tl.store(at + 5, tl.where(some, biased, 0))


@triton.jit(do_not_specialize=["tiles", "tile"])
def order_kernel(memory_ptr, tiles, tile, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Sorts tiles by how many keys they see. One program finds the places of BLOCK tiles.

    tiles: of all batch entries. tile: rows of one.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    header = memory_ptr.to(tl.pointer_type(tl.int32))
    order = header + HEADER + tiles.to(tl.int64) * (FIELDS + 2 * tile)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = _size(header, mine, tiles)
    place = mine * 0
    live = 0
    for start in range(0, tiles, BLOCK):
        other = start + tl.arange(0, BLOCK)
        its_size = _size(header, other, tiles)
        live += tl.sum((its_size > 0).to(tl.int32), 0)
        earlier = (its_size[None, :] > size[:, None]) | (
            (its_size[None, :] == size[:, None]) & (other[None, :] < mine[:, None])
        )
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, mine, mask=mine < tiles)
    if tl.program_id(0) == 0:
        tl.store(header, live)


@triton.jit
def _size(header, tile, tiles):
    """How many units of keys a tile visits; -1 where there is no such tile."""
    at = header + HEADER + tile.to(tl.int64) * FIELDS
    first = tl.load(at, mask=tile < tiles, other=0)
    end = tl.load(at + 1, mask=tile < tiles, other=0)
    return tl.where(tile < tiles, (end - first + _UNIT - 1) // _UNIT, -1)
