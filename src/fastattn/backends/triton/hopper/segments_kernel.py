"""The kernel of `segments.py`, which says what it fills."""

from __future__ import annotations

import triton
import triton.language as tl

from . import segments

HEADER = tl.constexpr(segments.HEADER_NUMBERS)
FIELDS = tl.constexpr(segments.TILE_NUMBERS)
_UNIT = tl.constexpr(64)  # keys; tiles whose numbers of keys differ by less keep their order, and so their keys in L2

_INTEGERS = [
    "table_sr", "table_sn", "table_rows", "count", "batch", "q_len", "kv_len", "left", "right", "per_entry", "most",
]  # fmt: skip


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clamped(x, most):
    return tl.minimum(tl.maximum(x, 0), most)


@triton.jit
def _start(entry, first, q_len, every):
    """Where a segment begins in the flattened batch, which has `every` rows."""
    return _clamped(entry.to(tl.int64) * q_len + _clamped(first, q_len), every).to(tl.int32)


@triton.jit
def _regions(n, before, table_ptr, table_sr, table_sn, table_rows, count, batch, q_len, kv_len, right):
    """The rows of the flattened batch that the segments n have: `[start, end)`, of which those from `live` on see keys;
    those of `[end, following)` are in no segment. Of a row the position is its number plus `shift`.

    before: a start before which no segment may begin. So in a table that is not sorted no row is found twice, or not at
    all.
    """
    every = batch * q_len
    q_row = table_rows % 2  # a table without batch entries is one row shorter: all its segments are in the first
    q_ptr = table_ptr + q_row * table_sr
    kv_ptr = table_ptr + (table_rows - 2) * table_sr
    there = n < count
    next_there = n + 1 < count
    at = n.to(tl.int64) * table_sn
    entry = tl.load(table_ptr + at, mask=n < count * q_row, other=0)
    first = tl.load(q_ptr + at, mask=there, other=0)
    q_end = tl.load(q_ptr + table_sr + at, mask=there, other=0)
    lo = tl.load(kv_ptr + at, mask=there, other=0)
    hi = tl.load(kv_ptr + table_sr + at, mask=there, other=0)
    next_entry = tl.load(table_ptr + at + table_sn, mask=n + 1 < count * q_row, other=0)
    next_first = tl.load(q_ptr + at + table_sn, mask=next_there, other=0)
    q_end = _clamped(q_end, q_len)
    lo = _clamped(lo, kv_len)
    hi = _clamped(hi, kv_len)
    # The last segment that begins at a row or before has the row, if any has.
    start = tl.where(there, _start(entry, first, q_len, every), every)
    start = tl.maximum(tl.associative_scan(start, 0, _greater), before)
    following = tl.maximum(tl.where(next_there, _start(next_entry, next_first, q_len, every), every), start)
    end = tl.maximum(tl.minimum(tl.where(there, _start(entry, q_end, q_len, every), 0), following), start)
    base = _start(entry, 0, q_len, every)
    shift = hi - q_end - base  # the segment's last query stands on its last key
    # The row at position p sees none where p + right is before the first key.
    live = tl.minimum(tl.maximum(start, lo - right - shift), end)
    live = tl.where(hi > lo, live, end)
    return base, start, live, end, following, shift, lo, hi


@triton.jit
def _above(keys, most, least, left, right, tiles, TILE: tl.constexpr):
    """Of a segment's first `tiles` tiles, those that see more than so many keys, counted without visiting them.

    most, least: of keys, one past the last and the first, from the position of the segment's first row on. Tile t sees
    min(most - TILE t, TILE + right) + min(TILE t - least, left) keys, but for rows that its last tile has not: that is
    the least of four lines.
    """
    end = tl.minimum((most + left - keys + TILE - 1) // TILE, tiles)
    first = (keys - right + least) // TILE  # of numbers that are not negative, where it counts
    first = tl.where(keys - right + least < 0, 0, first)
    end = tl.where(most + left > keys, end, 0)
    some = (most - least > keys) & (TILE + right + left > keys)
    return tl.where(some, tl.maximum(end - first, 0), 0)


@triton.jit
def _pieces_of(first, end, q_len, per_entry, TILE: tl.constexpr):
    """The tile, of those that the rows would have without segments, that holds the first row, and how many hold the
    rows up to the end."""
    last = tl.maximum(end - 1, 0)
    b = first // q_len
    c = last // q_len
    begin = b * per_entry + (first - b * q_len) // TILE
    return begin, tl.where(end > first, c * per_entry + (last - c * q_len) // TILE - begin + 1, 0)


@triton.jit
def _of(mine, x):
    """For each slot x of the segment that has it."""
    return tl.sum(tl.where(mine, x, 0), 0)


@triton.jit(do_not_specialize=_INTEGERS)
def segment_tiles_kernel(
    memory_ptr,  # uint8, see above
    table_ptr,  # int32 [2|3|4|5, N]
    table_sr,
    table_sn,
    table_rows,
    count,  # N
    batch,
    q_len,
    kv_len,
    left,  # of any size where the band is open there
    right,
    per_entry,  # q_len / TILE, rounded up
    most,  # tiles there is room for
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles and pieces of SLOTS consecutive numbers. Programs do not wait for each other: each looks at all segments,
    once for which tiles are its own, once for how many others see more keys."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    numbers = memory_ptr.to(tl.pointer_type(tl.int32))
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    none = slot * 0
    of, t, row, rows, base, shift, lo, hi = none, none, none, none, none, none, none, none
    piece, piece_first, piece_end = none, none, none
    tiles = 0
    pieces = 0
    before = 0
    for chunk in range(0, tl.maximum(count, 1), CHUNK):
        n = chunk + tl.arange(0, CHUNK)
        base_n, start_n, live_n, end_n, following_n, shift_n, lo_n, hi_n = _regions(
            n, before, table_ptr, table_sr, table_sn, table_rows, count, batch, q_len, kv_len, right
        )
        before = tl.max(start_n, 0)
        tiles_n = (end_n - live_n + TILE - 1) // TILE
        up_to_n = tiles + tl.cumsum(tiles_n, 0)
        tiles_before = tiles
        tiles += tl.sum(tiles_n, 0)
        if (tiles > tl.program_id(0) * SLOTS) & (tiles_before < (tl.program_id(0) + 1) * SLOTS):
            from_n = (up_to_n - tiles_n)[:, None]
            mine = (slot[None, :] >= from_n) & (slot[None, :] < up_to_n[:, None])
            of += _of(mine, n[:, None])
            t += _of(mine, slot[None, :] - from_n)
            row += _of(mine, live_n[:, None])
            rows += _of(mine, (end_n - live_n)[:, None])
            base += _of(mine, base_n[:, None])
            shift += _of(mine, shift_n[:, None])
            lo += _of(mine, lo_n[:, None])
            hi += _of(mine, hi_n[:, None])

        start_n = tl.where(n == 0, 0, start_n)
        if tl.sum(live_n - start_n + (following_n - end_n), 0) > 0:
            head_at_n, head_n = _pieces_of(start_n, live_n, q_len, per_entry, TILE)
            tail_at_n, tail_n = _pieces_of(end_n, following_n, q_len, per_entry, TILE)
            up_to_n = pieces + tl.cumsum(head_n + tail_n, 0)
            which = slot[None, :] - (up_to_n - head_n - tail_n)[:, None]
            mine = (which >= 0) & (slot[None, :] < up_to_n[:, None])
            head = which < head_n[:, None]
            piece += _of(mine, which + tl.where(head, head_at_n[:, None], (tail_at_n - head_n)[:, None]))
            piece_first += _of(mine, tl.where(head, start_n[:, None], end_n[:, None]))
            piece_end += _of(mine, tl.where(head, live_n[:, None], following_n[:, None]))
            pieces += tl.sum(head_n + tail_n, 0)

    if tl.program_id(0) == 0:
        tl.store(numbers, tiles)
        tl.store(numbers + 1, pieces)
        if tiles == 0:
            tl.store(numbers + HEADER + tl.arange(0, FIELDS), tl.zeros([FIELDS], tl.int32))
    if tl.program_id(0) * SLOTS < tiles:
        row += TILE * t
        rows = tl.minimum(rows - TILE * t, TILE)
        position = row + shift
        # How many keys the tile would see with all of its rows, and so many in units.
        keys = tl.minimum(hi - position, TILE + right) + tl.minimum(position - lo, left)
        keys = (keys + _UNIT - 1) // _UNIT * _UNIT
        place = none
        before = 0
        for chunk in range(0, count, CHUNK):
            n = chunk + tl.arange(0, CHUNK)
            base_n, start_n, live_n, end_n, following_n, shift_n, lo_n, hi_n = _regions(
                n, before, table_ptr, table_sr, table_sn, table_rows, count, batch, q_len, kv_len, right
            )
            before = tl.max(start_n, 0)
            tiles_n = ((end_n - live_n + TILE - 1) // TILE)[:, None]
            most_n = (hi_n - live_n - shift_n)[:, None]
            least_n = (lo_n - live_n - shift_n)[:, None]
            # Those of the same size come before it that are in earlier segments, or earlier in its own.
            n = n[:, None]
            earlier = tl.where(n < of[None, :], tiles_n, tl.where(n == of[None, :], t[None, :], 0))
            above = _above(keys[None, :], most_n, least_n, left, right, tiles_n, TILE)
            above += _above(keys[None, :] - _UNIT, most_n, least_n, left, right, earlier, TILE)
            above -= _above(keys[None, :], most_n, least_n, left, right, earlier, TILE)
            place += tl.sum(above, 0)
        here = slot < tiles
        at = numbers + HEADER + place * FIELDS
        tl.store(at, base // q_len, mask=here)
        tl.store(at + 1, row - base, mask=here)
        tl.store(at + 2, rows, mask=here)
        tl.store(at + 3, position, mask=here)
        tl.store(at + 4, tl.maximum(position - left, lo), mask=here)
        tl.store(at + 5, tl.minimum(position + rows + right, hi), mask=here)
    if tl.program_id(0) * SLOTS < pieces:
        b = piece // per_entry
        i = (piece - b * per_entry) * TILE
        first = tl.maximum(piece_first - b * q_len, i)
        end = tl.minimum(piece_end - b * q_len, tl.minimum(i + TILE, q_len))
        here = slot < pieces
        at = numbers + HEADER + (most + slot) * FIELDS
        tl.store(at, b, mask=here)
        tl.store(at + 1, first, mask=here)
        tl.store(at + 2, end - first, mask=here)
