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

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..._compat import torch as torch_internals
from ...call import CALL, Call, Problem
from ..layout import ALIGNMENT, aligned
from .arguments import band, broadcast_strides
from .binaries.launcher import Launch, Room, launcher_of, rooms_of
from .binaries.triton_kernel import NamedKernel
from .key_bias import RANGE_NUMBERS, KeyBias
from .launcher import overlaps
from .program import Named, Program, named
from .representative import stand_in

HEADER_NUMBERS = 4  #: before the tiles
TILE_NUMBERS = 8  #: of a tile
MOST_TOKENS = 1 << 30  #: positions and sums of two lengths are int32

_READ = "segments", "lo", "hi", "q_lengths", "kv_lengths"  #: of a call, by the kernel of bounds, after the memory
_BOUNDS = NamedKernel(f"{__package__}.bounds_kernel", "bounds_kernel")
_ORDER = NamedKernel(f"{__package__}.bounds_kernel", "order_kernel")


#: The arguments of launches, each with its pointers besides the memory: where they are, and which fields of the call.
_Found = Sequence[tuple[Room, Sequence[tuple[int, int]]]]


class _Rooms(threading.local):
    """One thread's: see `Bounds._found`."""

    found: _Found | None = None


class Bounds:
    """The bounds of calls of one kind: same problem, same strides.

    size: bytes of the memory that it fills; tiles, lo_at, hi_at, order_at: see the module. keys: the biases of a tensor
    mask that is broadcast along the queries, or None.
    """

    __slots__ = (
        "_bounds", "_index", "_order", "_rooms", "_strided", "hi_at", "keys", "lo_at", "order_at", "size", "tiles",
    )  # fmt: skip

    def __init__(self, p: Problem, call: Call, tile: int = 128, ordered: bool = False) -> None:
        """tile: rows of a tile, a power of two. ordered: sort the tiles too, by a launch more.

        The problem has fewer than MOST_TOKENS queries and keys together: who uses it refuses others.
        """
        assert p.q_len + p.kv_len < MOST_TOKENS
        self.tiles = -(-p.q_len // tile)
        every = p.batch * self.tiles
        self.lo_at = HEADER_NUMBERS + every * TILE_NUMBERS
        self.hi_at = self.lo_at + every * tile
        self.order_at = self.hi_at + every * tile
        end = self.order_at + (every if ordered else 0)
        self.keys = KeyBias(p, call, end) if p.masked_keys else None
        ranges = (0, 0, 0)
        if self.keys is not None:
            end = self.keys.end
            ranges = self.keys.ranges_at, RANGE_NUMBERS * self.keys.heads * (p.mask_shape[0] > 1), self.keys.heads
        self.size = 4 * end
        self._index = call.q.device.index
        self._rooms = _Rooms()
        left, right = band(p)
        table, lo, hi = call.segments, call.lo, call.hi
        rows, count = (0, 0) if table is None else table.shape
        table_strides = (0, 0) if table is None else table.stride()
        #: Whether lo and hi have to be laid out alike before the kernel can read them.
        self._strided = broadcast_strides(lo, 2) != broadcast_strides(hi, 2)
        interval_strides = broadcast_strides(lo.contiguous() if lo is not None and self._strided else lo, 2)
        pdl = overlaps(p.capability)
        options = {"launch_pdl": True} if pdl else {}
        self._bounds = launcher_of(
            _BOUNDS,
            (self.tiles, p.batch),
            call.q.device,
            p.capability,
            (*table_strides, rows, *interval_strides, p.q_len, p.kv_len, left, right, count, count.bit_length(),
             *ranges),
            (tile, pdl),
            num_warps=max(1, min(4, tile // 32)),
            **options,
        )  # fmt: skip
        block = 64
        self._order = None
        if ordered:
            grid = (-(-every // block),)
            self._order = launcher_of(
                _ORDER, grid, call.q.device, p.capability, (every, tile), (block, pdl), num_warps=4, **options
            )

    def launches(self, call: Call) -> list[Launch]:
        """What `binaries.launcher.prepare` takes."""
        return self.in_order(call, stand_in(torch.uint8))

    def in_order(self, call: Call, memory: Any) -> list[Launch]:
        """The launches that fill the memory, in order. Takes `Named` in the place of tensors, too."""
        found = [] if self.keys is None else self.keys.in_order(call, memory)
        found.append((self._bounds, (memory, *[getattr(call, name) for name in _READ]), ()))
        if self._order is not None:
            found.append((self._order, (memory,), ()))
        return found

    def __call__(self, call: Call, memory: Tensor) -> None:
        """Fills the memory: uint8, contiguous, at least `size` bytes on the call's device, its address a multiple of 16
        (`scratch`), on the current stream."""
        rooms, tensors = self._rooms.found, cast("Sequence[Tensor]", call)
        if rooms and self._index == torch_internals.current_device():
            address = bits = memory.data_ptr()
            for room, fields in rooms:
                values = room.values
                values[0] = address
                for i, field in fields:
                    given = values[i] = tensors[field].data_ptr()
                    bits |= given
            if not bits % ALIGNMENT:
                stream = torch_internals.raw_stream(self._index)
                for room, _ in rooms:
                    room.launch(stream)
                return
        self._fill(call, memory)
        if rooms is None:
            self._rooms.found = self._found(call)

    def _found(self, call: Call) -> _Found | None:
        """What `__call__` keeps. Nothing, or None: see `_made`."""
        rooms = self._made(call)
        if not rooms:
            return None if rooms is None else ()
        found = []
        for room, (_, pointers, _) in zip(rooms, self.in_order(named(call), Named("memory")), strict=True):
            sources = [cast("Named", x).source for x in pointers[1:] if x is not None]
            found.append((room, list(enumerate([CALL.names.index(source) for source in sources], 1))))
        return found

    def _made(self, call: Call) -> Sequence[Room] | None:
        """This thread's arguments of all launches. Nothing where tensors have to be copied first, or nothing is
        launched on a GPU; None where the call does not say: its launches were not those for aligned tensors."""
        lengths = call.q_lengths, call.kv_lengths
        if self._strided or not all([x is None or x.is_contiguous() for x in lengths]):
            return ()
        if not aligned(*[x for name in (*_READ, "mask") if (x := getattr(call, name)) is not None]):
            return None
        return rooms_of(self.launches(call)) or ()

    def add_to(self, program: Program, call: Call) -> bool:
        """Its launches, over memory that the program's begins with. False where there is more to such calls."""
        rooms = self._made(call)
        if rooms:
            program.add_all(rooms, self.in_order(named(call), Named("memory")), aligned=True)
        return bool(rooms)

    def _fill(self, call: Call, memory: Tensor) -> None:
        """`__call__`, for tensors of any alignment, and where it has not run before."""
        lo, hi = call.lo, call.hi
        if self._strided and lo is not None and hi is not None:
            lo, hi = lo.contiguous(), hi.contiguous()
        q_lengths, kv_lengths = call.q_lengths, call.kv_lengths
        if q_lengths is not None and not q_lengths.is_contiguous():
            q_lengths = q_lengths.contiguous()
        if kv_lengths is not None and not kv_lengths.is_contiguous():
            kv_lengths = kv_lengths.contiguous()
        call = call._replace(lo=lo, hi=hi, q_lengths=q_lengths, kv_lengths=kv_lengths)
        for launcher, tensors, _ in self.in_order(call, memory):
            launcher(tensors)
