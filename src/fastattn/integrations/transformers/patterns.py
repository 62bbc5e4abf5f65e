"""`Pattern`: a mask of transformers as numbers, read from its mask function.

All mask functions that transformers composes (`_compat/mask_functions.py`) leave each query one interval of keys, whose
ends follow from the values that the functions were made with: no mask need be evaluated. Any other function is not
recognised, and the caller has to evaluate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat import mask_functions


class Pattern(NamedTuple):
    """An intersection of causal, window, chunk and packing masks. A query at position p sees `[p - left, p + right]`
    within its chunk and its segment; -1 means open. Positions count from the start of the sequence, as transformers'
    `q_idx` and `kv_idx` do, or are given by `positions`.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0  #: queries see keys of their own chunk of this many positions (Llama 4); 0 = off
    chunk_start: Tensor | None = None  #: [B], position at which chunks begin: the row's left padding
    segments: Tensor | None = None  #: [B, S], number of the packed sequence that each token belongs to
    positions: Tensor | None = None  #: [B, S], each token's position within its packed sequence

    @property
    def is_band(self) -> bool:
        """True without chunks and segments: `left` and `right` are the whole mask."""
        return not self.chunk and self.segments is None

    @property
    def is_open(self) -> bool:
        """True where every query sees every key."""
        return self.is_band and self.left < 0 and self.right < 0

    def intersect(self, other: Pattern) -> Pattern | None:
        """The keys that both let see; None where that cannot be written as a Pattern."""
        a, b = self, other
        if (a.chunk and b.chunk) or (a.segments is not None and b.segments is not None):
            return None
        # A chunk counts positions: it must keep the positions that it was made for.
        if (a.positions is not None and (b.chunk or b.positions is not None)) or (b.positions is not None and a.chunk):
            return None
        return Pattern(
            _narrower(a.left, b.left),
            _narrower(a.right, b.right),
            a.chunk or b.chunk,
            a.chunk_start if b.chunk_start is None else b.chunk_start,
            a.segments if b.segments is None else b.segments,
            a.positions if b.positions is None else b.positions,
        )

    def bounds(self, position: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """First visible key and one past the last one, as positions; None = open.

        position: integer `[1, Sq]`, of the queries. The results are `[1 or B, Sq]` and may lie outside of the keys.
        """
        lo = None if self.left < 0 else position - self.left
        hi = None if self.right < 0 else position + self.right + 1
        if self.chunk:
            within = position if self.positions is None else self.positions
            if self.chunk_start is not None:
                within = within - self.chunk_start[:, None].to(within.device)
            first = position - within.remainder(self.chunk)
            lo = first if lo is None else torch.maximum(lo, first)
            hi = first + self.chunk if hi is None else torch.minimum(hi, first + self.chunk)
        if self.segments is not None:
            ids = self.segments.contiguous()
            first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
            lo = first if lo is None else torch.maximum(lo, first)
            hi = last if hi is None else torch.minimum(hi, last)
        return lo, hi

    def sorted_segments(self) -> Tensor:
        """A bool scalar: packed sequences lie end to end, numbered upwards, with positions that count by one.

        Only then is a segment an interval, and only then does a distance in positions equal one in tokens.
        """
        assert self.segments is not None
        step = self.segments.diff(dim=-1)
        fits = step >= 0
        if self.positions is not None:
            fits = fits & ((step > 0) | (self.positions.diff(dim=-1) == 1))
        return fits.all()


def recognise(mask_function: Callable[..., Any]) -> Pattern | None:
    """The Pattern that a mask function of transformers computes; None for any other function."""
    pattern = _read(mask_function)
    if pattern is not None and pattern.positions is not None and pattern.segments is None:
        return None  # positions that restart need the segments within which they hold
    return pattern


def _read(mask_function: Callable[..., Any]) -> Pattern | None:
    found = mask_functions.read(mask_function)
    if found is None:
        return None
    name, values = found
    return _PATTERNS[name](**values)


def _intersection(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    result: Pattern | None = Pattern()
    for function in mask_functions:
        part = _read(function)
        if part is None or result is None:
            return None
        result = result.intersect(part)
    return result


def _remapped(mask_function: Callable[..., Any], position_ids: Tensor) -> Pattern | None:
    inner = _read(mask_function)
    if inner is None or inner.segments is not None or inner.positions is not None:
        return None
    return inner._replace(positions=position_ids)


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


#: By the qualified name of a mask function: the Pattern of the values that it was made with.
_PATTERNS: dict[str, Callable[..., Pattern | None]] = {
    "causal_mask_function": lambda: Pattern(right=0),
    "bidirectional_mask_function": lambda: Pattern(),
    "and_masks.<locals>.and_mask": _intersection,
    "sliding_window_overlay.<locals>.inner_mask": lambda sliding_window: Pattern(left=sliding_window - 1),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda sliding_window: Pattern(
        left=sliding_window, right=sliding_window
    ),
    "chunked_overlay.<locals>.inner_mask": lambda chunk_size, left_padding: Pattern(
        chunk=chunk_size, chunk_start=left_padding
    ),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda packed_sequence_mask: Pattern(
        segments=packed_sequence_mask
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _remapped,
}
