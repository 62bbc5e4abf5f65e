"""Tiles of segments, found on the device for the Hopper forward that is launched next.

A tile is up to 128 query rows of one segment, so what its rows see is a band: its rows follow each other, and the last
row of a segment stands on the segment's last key. The memory that `SegmentTiles` fills, in int32 numbers:

    0   [8]             the number of tiles with keys; of pieces without; six unused
    8   [tiles, 8]      per tile, those that see most keys first:
                        0  batch entry
                        1  its first query row, and
                        2  how many rows it has, of which each sees a key
                        3  the position of the first row among the keys
                        4  the first key that the tile sees, and
                        5  one past the last: a row at position p sees the keys of [4, 5) in [p - left, p + right]
                        6..7  unused
    at `tiles`  [pieces, 8]  rows that see no key, in pieces of up to 128: numbers 0 to 2 of the same

Each query row is in one tile or one piece, whatever the table holds. What the rows see is what `masks.segment_bounds`
says, if the table is sorted. Without tiles there is one of no rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....call import Call, Problem
from ...layout import aligned
from ..binaries.launcher import Launch, launcher_of, rooms_of
from ..binaries.triton_kernel import NamedKernel
from ..launcher import overlaps
from ..program import Named, Program, named
from ..representative import stand_in

HEADER_NUMBERS = 8  #: before the tiles
TILE_NUMBERS = 8  #: of a tile, or a piece
#: Queries of a segment in the mean, empty ones counted in, with fewer of which the bounds of rows are the quicker way:
#: there one tile has the rows of several segments. Measured on an H200, 16384 queries: 0.79 of their time with 128 and
#: 2.2 times with 32 in the mean.
LEAST_QUERIES = 96
#: Each program looks at all segments: 0.25 ms with so many, one processor's share counted.
MOST_SEGMENTS = 4096
MOST_ROWS = 1 << 30  #: of all batch entries: their numbers, and sums of one and a window, are int32

_KERNEL = NamedKernel(f"{__package__}.segments_kernel", "segment_tiles_kernel")
#: Tiles of a program, of one warp: no barriers, few shuffles. And segments that it looks at together.
_SLOTS, _CHUNK = 8, 64


def pays(p: Problem) -> bool:
    """Whether tiles of one segment each are the quicker way for a problem with Segments, as far as lengths tell."""
    count = p.mask_shape[1]
    return count <= MOST_SEGMENTS and p.batch * p.q_len >= LEAST_QUERIES * count


class SegmentTiles:
    """Of calls of one kind: same problem, same strides of the table.

    tiles: as many as there may be, whatever the table holds. size: bytes of the memory that it fills.
    """

    __slots__ = ("_launch", "size", "tiles")
    keys: Any = None  #: see `Bounds`

    def __init__(self, p: Problem, call: Call, tile: int, sides: tuple[int, int]) -> None:
        """tile: rows of a tile. sides: of the band, as the main kernel takes them."""
        assert call.segments is not None and p.batch * p.q_len <= MOST_ROWS
        rows, count = call.segments.shape
        per_entry = -(-p.q_len // tile)
        # Of each range of rows all tiles but the last are full. A piece is a part of one of as many tiles as the rows
        # would have without segments; each end of a range of rows without keys may cut one more.
        self.tiles = p.batch * per_entry + count
        pieces = p.batch * per_entry + 2 * count + 1
        self.size = 4 * (HEADER_NUMBERS + TILE_NUMBERS * (self.tiles + pieces))
        pdl = overlaps(p.capability)
        options = {"launch_pdl": True} if pdl else {}
        self._launch = launcher_of(
            _KERNEL,
            (-(-pieces // _SLOTS),),
            call.q.device,
            p.capability,
            (*call.segments.stride(), rows, count, p.batch, p.q_len, p.kv_len, *sides, per_entry, self.tiles),
            (tile, _SLOTS, _CHUNK, pdl),
            1,
            num_warps=1,
            **options,
        )

    def launches(self, call: Call) -> list[Launch]:
        """What `binaries.launcher.prepare` takes."""
        return self.in_order(call, stand_in(torch.uint8))

    def in_order(self, call: Call, memory: Any) -> list[Launch]:
        """See `Bounds.in_order`."""
        return [(self._launch, (memory, call.segments), ())]

    def __call__(self, call: Call, memory: Tensor) -> None:
        """Fills the memory: uint8, contiguous, at least `size` bytes on the call's device, its address a multiple of 16
        (`scratch`), on the current stream."""
        self._launch((memory, call.segments))

    def add_to(self, program: Program, call: Call) -> bool:
        """See `Bounds.add_to`."""
        assert call.segments is not None
        rooms = rooms_of(self.launches(call)) if aligned(call.segments) else None
        if rooms is None:
            return False
        program.add_all(rooms, self.in_order(named(call), Named("memory")), aligned=True)
        return True
