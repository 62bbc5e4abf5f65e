"""Which keys each row and each tile of rows sees, computed on the device for the kernel that is launched next.

Segments, Intervals, the band and lengths become one thing here: bounds `[lo, hi)` per query. A forward kernel reads
them instead of four kinds of masks, and finds per tile of rows which keys it has to visit at all. A tensor mask that is
the same for all queries narrows them, and becomes a bias of each key (`key_bias.py`).

The memory that `Bounds` fills, in int32 numbers; T tiles of `tile` rows in each of B batch entries:

    0       [4]           with `ordered`: the number of tiles with keys, three unused; else unused
    4       [B, T, 8]     per tile, over its rows that see a key:
                          0  the least lo: the first key that the tile sees
                          1  the greatest hi: one past its last key
                          2  the greatest lo, and
                          3  the least hi: each of the rows sees all keys of [2, 3), if 2 < 3
                          4  1 where a key between 0 and 1 may be seen by none of the rows; 0: each is seen by one
                          5  1 where a tensor mask's biases are to be added; 0: the bounds say all of it
                          6..7  unused
                          All 0 in a tile without keys.
    lo_at   [B, T * tile] per row its lo
    hi_at   [B, T * tile] per row its hi; lo = hi = 0 in rows that see no key, and in those past Sq
    order_at  [B * T]     with `ordered`: the tiles (b * T + t), those that see most keys first, those without keys last
    and the ranges and biases of `KeyBias`, where there is such a mask

Rows that see a key have exactly the bounds of `masks.bounds`, within the range of keys that the mask leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Call, Problem
from .arguments import band, broadcast_strides
from .binaries.launcher import Launch, launcher_of
from .key_bias import RANGE, KeyBias, is_key_mask, narrowed
from .launcher import overlaps
from .masking import visible_keys
from .representative import stand_in

HEADER = tl.constexpr(4)  #: numbers before the tiles
FIELDS = tl.constexpr(8)  #: numbers of a tile
_UNIT = tl.constexpr(64)  # keys; tiles whose numbers of keys differ by less keep their order, and so their keys in L2
MOST_TOKENS = 1 << 30  #: positions and sums of two lengths are int32

_INTEGERS = [
    "table_sr", "table_sn", "interval_sb", "interval_si", "q_len", "kv_len", "left", "right", "count", "steps",
    "ranges_at", "ranges_sb", "ranges_heads",
]  # fmt: skip


@triton.jit
def _segment_keys(b, i, valid, table_ptr, table_sr, table_sn, q_len, kv_len, left, right, count, steps, ROWS):
    """The keys `[lo, hi)` that segments let the rows i of batch entry b see. Equals `masks.segment_bounds`.

    steps: at least log2(count + 1), rounded up.
    """
    # Of the segments, which are sorted, the last that begins at the row or before.
    here = b.to(tl.int64) * q_len + i
    first = i * 0
    end = first + count
    for _ in range(steps):
        middle = (first + end) // 2
        searching = first < end
        at = middle.to(tl.int64) * table_sn
        entry = tl.load(table_ptr + at, mask=searching, other=0)
        start = tl.load(table_ptr + table_sr + at, mask=searching, other=0)
        start = tl.minimum(tl.maximum(start, 0), q_len)
        before = searching & (entry.to(tl.int64) * q_len + start <= here)
        end = tl.where(searching & (before == 0), middle, end)
        first = tl.where(before, middle + 1, first)
    found = first > 0
    row_ptr = table_ptr + tl.maximum(first - 1, 0).to(tl.int64) * table_sn
    entry = tl.load(row_ptr, mask=found, other=-1)
    q_end = tl.load(row_ptr + 2 * table_sr, mask=found, other=0)
    lo = tl.load(row_ptr + (ROWS - 2) * table_sr, mask=found, other=0)
    hi = tl.load(row_ptr + (ROWS - 1) * table_sr, mask=found, other=0)
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
    table_ptr,  # int32 [3|5, N], or None: Intervals, band and lengths
    lo_ptr,  # int32 [B|1, Sq|1], or None
    hi_ptr,
    q_lengths_ptr,  # int32 [B], or None
    kv_lengths_ptr,
    table_sr,
    table_sn,
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
    ROWS: tl.constexpr,  # of the table
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
            b, i, valid, table_ptr, table_sr, table_sn, q_len, kv_len, left, right, count, steps, ROWS
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


class Bounds:
    """The bounds of calls of one kind: same problem, same strides.

    size: bytes of the memory that it fills; tiles, lo_at, hi_at, order_at: see the module. keys: the biases of a tensor
    mask that is broadcast along the queries, or None.
    """

    __slots__ = ("_bounds", "_order", "_strided", "hi_at", "keys", "lo_at", "order_at", "size", "tiles")

    def __init__(self, p: Problem, call: Call, tile: int = 128, ordered: bool = False) -> None:
        """tile: rows of a tile, a power of two. ordered: sort the tiles too, by a launch more.

        The problem has fewer than MOST_TOKENS queries and keys together: who uses it refuses others.
        """
        assert p.q_len + p.kv_len < MOST_TOKENS
        self.tiles = -(-p.q_len // tile)
        every = p.batch * self.tiles
        self.lo_at = HEADER.value + every * FIELDS.value
        self.hi_at = self.lo_at + every * tile
        self.order_at = self.hi_at + every * tile
        end = self.order_at + (every if ordered else 0)
        self.keys = KeyBias(p, call, end) if is_key_mask(p) else None
        ranges = (0, 0, 0)
        if self.keys is not None:
            end = self.keys.end
            ranges = self.keys.ranges_at, RANGE.value * self.keys.heads * (p.mask_shape[0] > 1), self.keys.heads
        self.size = 4 * end
        left, right = band(p)
        table, lo, hi = call.segments, call.lo, call.hi
        count = 0 if table is None else table.shape[1]
        table_strides = (0, 0) if table is None else table.stride()
        #: Whether lo and hi have to be laid out alike before the kernel can read them.
        self._strided = broadcast_strides(lo, 2) != broadcast_strides(hi, 2)
        interval_strides = broadcast_strides(lo.contiguous() if lo is not None and self._strided else lo, 2)
        pdl = overlaps(p.capability)
        options = {"launch_pdl": True} if pdl else {}
        self._bounds = launcher_of(
            bounds_kernel,
            (self.tiles, p.batch),
            call.q.device,
            p.capability,
            (*table_strides, *interval_strides, p.q_len, p.kv_len, left, right, count, count.bit_length(), *ranges),
            (0 if table is None else table.shape[0], tile, pdl),
            num_warps=max(1, min(4, tile // 32)),
            **options,
        )
        block = 64
        self._order = None
        if ordered:
            grid = (-(-every // block),)
            self._order = launcher_of(
                order_kernel, grid, call.q.device, p.capability, (every, tile), (block, pdl), num_warps=4, **options
            )

    def launches(self, call: Call) -> list[Launch]:
        """What `binaries.launcher.prepare` takes."""
        memory = stand_in(torch.uint8)
        tensors = memory, call.segments, call.lo, call.hi, call.q_lengths, call.kv_lengths
        found: list[Launch] = [(self._bounds, tensors, ())]
        if self._order is not None:
            found.append((self._order, (memory,), ()))
        if self.keys is not None:
            found += self.keys.launches(call)
        return found

    def __call__(self, call: Call, memory: Tensor) -> None:
        """Fills the memory: uint8, contiguous, at least `size` bytes on the call's device, its address a multiple of 16
        (`scratch`), on the current stream."""
        lo, hi = call.lo, call.hi
        if self._strided and lo is not None and hi is not None:
            lo, hi = lo.contiguous(), hi.contiguous()
        q_lengths, kv_lengths = call.q_lengths, call.kv_lengths
        if q_lengths is not None and not q_lengths.is_contiguous():
            q_lengths = q_lengths.contiguous()
        if kv_lengths is not None and not kv_lengths.is_contiguous():
            kv_lengths = kv_lengths.contiguous()
        if self.keys is not None:
            self.keys(call, memory)
        self._bounds((memory, call.segments, lo, hi, q_lengths, kv_lengths))
        if self._order is not None:
            self._order((memory,))
