"""`Plan`: the blocks that each rank computes, and the keys that it needs for them. Made once per shape, on the host.

Every strategy that moves keys and values is a list of blocks: some rows of a rank's queries against some of the keys
that it has received. Where the mask allows, a block is a plain or a causal rectangle, which the fastest kernels serve;
`_Viewer` looks for those first, whatever the mask was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..masks import Intervals, Segments
from .layout import Layout, Span

Table = tuple[tuple[int, int, int], ...]  #: (batch entry, first token, one past the last) of each segment


@dataclass(frozen=True)
class Pattern:
    """The mask of the whole sequence: a band, within segments if there are any. Hashable."""

    length: int
    batch: int
    left: int = -1  #: the query at position p sees `[p - left, p + right]`, -1 meaning open
    right: int = -1
    segments: Table | None = None

    @property
    def plain(self) -> bool:
        """True when it is causal or open, without window and segments."""
        return self.segments is None and self.left < 0 and self.right in (-1, 0)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First visible key and one past the last one of each query: int32 `[batch or 1, length]`, on the CPU."""
        if self.segments is not None:
            table = torch.tensor(self.segments, dtype=torch.int32).reshape(-1, 3).T.contiguous()
            return masks.segment_bounds(table, self.batch, self.length, self.length, self.left, self.right)
        position = torch.arange(self.length, dtype=torch.int32)[None]
        lo = torch.zeros_like(position) if self.left < 0 else (position - self.left).clamp(min=0)
        hi = torch.full_like(position, self.length)
        return lo, hi if self.right < 0 else (position + self.right + 1).clamp(max=self.length)


class Block(NamedTuple):
    """One call of the op on a rank."""

    rows: Span  #: of the rank's queries
    keys: Span  #: of the keys that the rank has
    mask: str | Segments | Intervals | None
    window: tuple[int, int] | None


class Step(NamedTuple):
    """One round of an exchange: the spans of `source` that are received and those sent to `target` meanwhile."""

    source: int
    receive: tuple[Span, ...]
    target: int
    send: tuple[Span, ...]
    blocks: tuple[Block, ...]  #: with keys counted in what was received


@dataclass(frozen=True)
class Plan:
    """One rank's blocks for calls of one shape."""

    layout: Layout
    rank: int
    pattern: Pattern
    device: torch.device

    @cached_property
    def whole(self) -> tuple[Block, ...]:
        """This rank's queries against all keys, in the order of the sequence."""
        return tuple(_Viewer(self).blocks(self.rank, None))

    @cached_property
    def whole_backward(self) -> tuple[Block, ...]:
        """The same without causal rectangles: causal squares and what lies before them. Kernels that align a
        causal mask to the lower right are 1.4 to 1.6 times slower in the backward."""
        return tuple(part for block in self.whole for part in _squared(block))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The exchange: in step s rank r works on what rank r - s holds. Step 0 is its own."""
        viewer, ranks = _Viewer(self), self.layout.ranks
        found = []
        for step in range(ranks):
            source, target = (self.rank - step) % ranks, (self.rank + step) % ranks
            blocks = viewer.blocks(self.rank, source)
            receive = _union(block.keys for block in blocks)
            send = receive if not step else _union(block.keys for block in viewer.blocks(target, self.rank))
            found.append(Step(source, receive, target, send, tuple(_moved(block, receive) for block in blocks)))
        return tuple(found)


class _Viewer:
    """Finds the blocks of a plan: which queries see which keys."""

    def __init__(self, plan: Plan) -> None:
        self.layout, self.pattern, self.device = plan.layout, plan.pattern, plan.device
        self.lo, self.hi = plan.pattern.bounds()

    def blocks(self, viewer: int, holder: int | None) -> list[Block]:
        """The blocks of a rank's queries and the keys that another holds (None: all keys)."""
        layout = self.layout
        rows = [_Piece(piece, chunk.start) for piece, chunk in zip(layout.pieces(viewer), layout.held(viewer))]
        keys = [_Piece(Span(0, layout.length), 0)]
        if holder is not None:
            keys = [_Piece(piece, chunk.start) for piece, chunk in zip(layout.pieces(holder), layout.held(holder))]
        # A rank's keys ascend in position, so a query sees one interval of them as well.
        lo, hi = (
            sum(((x - piece.position).clamp(0, piece.span.size) for piece in keys), start=torch.zeros_like(x))
            for x in (layout.take(x, 1, viewer) for x in (self.lo, self.hi))
        )
        return self._blocks(lo, hi, rows, keys)

    def _blocks(self, lo: Tensor, hi: Tensor, rows: list[_Piece], keys: list[_Piece]) -> list[Block]:
        """lo, hi: `[batch or 1, rows]`, from the first row of the first piece; keys counted as the rank has them."""
        seeing = (hi > lo).any(0).nonzero()
        if not len(seeing):
            return []
        first, last = int(seeing[0]), int(seeing[-1]) + 1
        lo, hi = lo[:, first:last], hi[:, first:last]
        begin, end = int(lo[hi > lo].min()), int(hi[hi > lo].max())
        span = Span(rows[0].span.start + first, rows[0].span.start + last)
        band = _band(lo - begin, hi - begin, end - begin)
        if band is not None:
            return [Block(span, Span(begin, end), *band)]
        if len(rows) > 1:
            found = []
            for piece in rows:
                a, b = max(piece.span.start, span.start), min(piece.span.stop, span.stop)
                if a < b:
                    part = slice(a - span.start, b - span.start)
                    found += self._blocks(lo[:, part], hi[:, part], [_Piece(Span(a, b), piece.at(a))], keys)
            return found
        if len(keys) > 1:
            return [
                block
                for piece in keys
                for block in self._blocks(lo.clamp(*piece.span), hi.clamp(*piece.span), [rows[0].cut(span)], [piece])
            ]
        keys_span = Span(begin, end)
        found_segments = self._segments(span, rows[0].at(span.start), keys_span, keys[0].at(begin))
        if found_segments is not None:
            return [found_segments]
        intervals = [(x - begin).clamp(0, end - begin).to(torch.int32).to(self.device) for x in (lo, hi)]
        return [Block(span, keys_span, Intervals(*intervals), None)]

    def _segments(self, rows: Span, q_first: int, keys: Span, k_first: int) -> Block | None:
        """The block as the parts of segments that lie in it; None where their alignment differs from the op's."""
        pattern, table = self.pattern, []
        q_end, k_end = q_first + rows.size, k_first + keys.size
        for entry, start, stop in pattern.segments or ():
            q = Span(max(start, q_first), min(stop, q_end))
            k = Span(max(start, k_first), min(stop, k_end, q.stop if pattern.right == 0 else stop))
            if q.size > 0 and k.size > 0:
                table.append((entry, q, k))
        aligned = all(q.stop == k.stop for _, q, k in table)
        before = pattern.right == 0 and all(k.stop <= q.start for _, q, k in table)
        banded = pattern.left >= 0 or pattern.right >= 0
        if pattern.segments is None or not (aligned or not banded or (before and pattern.left < 0)):
            return None
        columns = [[entry, q.start - q_first, q.stop - q_first] for entry, q, _ in table]
        if any(q != k for _, q, k in table) or q_first != k_first or rows.size != keys.size:
            columns = [[*c, k.start - k_first, k.stop - k_first] for c, (_, _, k) in zip(columns, table)]
        made = torch.tensor(columns, dtype=torch.int32).T.contiguous().to(self.device)
        causal = pattern.right == 0 and not before
        window = (pattern.left, pattern.right) if aligned and (pattern.left >= 0 or pattern.right > 0) else None
        return Block(rows, keys, Segments(made, causal), window)


class _Piece(NamedTuple):
    """Neighbouring tokens: their span of what a rank has, and the position of the first of them."""

    span: Span
    position: int

    def at(self, index: int) -> int:
        return self.position + index - self.span.start

    def cut(self, span: Span) -> _Piece:
        return _Piece(span, self.at(span.start))


def _band(lo: Tensor, hi: Tensor, keys: int) -> tuple[str | None, tuple[int, int] | None] | None:
    """The op's mask and window for these intervals of a rectangle of queries and keys; None where there are none."""
    rows = lo.shape[1]
    left = keys - 1 - int(lo[0, -1]) if int(lo[0, -1]) else -1
    right = int(hi[0, 0]) - 1 - (keys - rows) if int(hi[0, 0]) < keys else -1
    if left < -1 or right < -1 or (int(hi[0, 0]) < keys and right < 0):
        return None
    position = torch.arange(keys - rows, keys)
    want_lo = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
    want_hi = (position + right + 1).clamp(max=keys) if right >= 0 else torch.full_like(position, keys)
    if not (torch.equal(lo, want_lo.expand_as(lo)) and torch.equal(hi, want_hi.expand_as(hi))):
        return None
    if left < 0 and right <= 0:
        return ("causal" if right == 0 else None), None
    return None, (left, right)


def _squared(block: Block) -> list[Block]:
    extra = block.keys.size - block.rows.size
    if block.mask != "causal" or extra <= 0:
        return [block]
    middle = block.keys.start + extra
    before = block._replace(keys=Span(block.keys.start, middle), mask=None)
    return [before, block._replace(keys=Span(middle, block.keys.stop))]


def _union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same indices as sorted spans that do not touch."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return tuple(found)


def _moved(block: Block, received: tuple[Span, ...]) -> Block:
    """The block with its keys counted in the received spans laid end to end."""
    before = 0
    for span in received:
        if span.start <= block.keys.start and block.keys.stop <= span.stop:
            start = before + block.keys.start - span.start
            return block._replace(keys=Span(start, start + block.keys.size))
        before += span.size
    raise AssertionError(f"{block.keys} is not in {received}")
