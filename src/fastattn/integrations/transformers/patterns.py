"""What transformers' mask functions mean, read from the functions themselves.

transformers describes a mask as a function of indices, put together from a few closures (`masking_utils.py`). Those
few all leave each query one interval of keys, whose ends follow from the closures' own numbers: no mask need be
evaluated. A function put together from anything else is not recognised, and the caller must evaluate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat import hf as masking_utils


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
        """True without chunks and segments: `left` and `right` say it all."""
        return not self.chunk and self.segments is None

    @property
    def is_open(self) -> bool:
        """True where every query sees every key."""
        return self.is_band and self.left < 0 and self.right < 0

    def meet(self, other: Pattern) -> Pattern | None:
        """What both let see; None where that cannot be written as a Pattern."""
        a, b = self, other
        if (a.chunk and b.chunk) or (a.segments is not None and b.segments is not None):
            return None
        # A chunk counts positions: it must stand with the positions it was written for.
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
    """The Pattern that a mask function of transformers computes, None for any function not known."""
    pattern = _read(mask_function)
    if pattern is not None and pattern.positions is not None and pattern.segments is None:
        return None  # positions that start again and again, without the segments within which they hold
    return pattern


def _read(mask_function: Callable[..., Any]) -> Pattern | None:
    if mask_function is masking_utils.UNDERSTOOD_CAUSAL:
        return Pattern(right=0)
    if mask_function is masking_utils.UNDERSTOOD_OPEN:
        return Pattern()
    if torch.compiler.is_compiling():
        return None  # torch.compile does not let a traced closure be looked into
    if getattr(mask_function, "__qualname__", None) not in masking_utils.UNDERSTOOD:
        return None
    if getattr(mask_function, "__module__", "") != masking_utils.MASKING:
        return None
    if mask_function.__qualname__ not in masking_utils.UNDERSTOOD:
        return None
    expected, read = _CLOSURES.get(mask_function.__qualname__, ((), None))
    if read is None or mask_function.__code__.co_freevars != expected:
        return None
    return read(*(cell.cell_contents for cell in mask_function.__closure__ or ()))


def _intersection(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    result: Pattern | None = Pattern()
    for function in mask_functions:
        part = _read(function)
        if part is None or result is None:
            return None
        result = result.meet(part)
    return result


def _remapped(mask_function: Callable[..., Any], position_ids: Tensor) -> Pattern | None:
    inner = _read(mask_function)
    if inner is None or inner.segments is not None or inner.positions is not None:
        return None
    return inner._replace(positions=position_ids)


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


#: Closures by qualified name: their variables (in alphabetical order, as Python keeps them), and what they mean.
_CLOSURES: dict[str, tuple[tuple[str, ...], Callable[..., Pattern | None] | None]] = {
    "and_masks.<locals>.and_mask": (("mask_functions",), _intersection),
    "sliding_window_overlay.<locals>.inner_mask": (("sliding_window",), lambda w: Pattern(left=w - 1)),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": (
        ("sliding_window",),
        lambda w: Pattern(left=w, right=w),
    ),
    "chunked_overlay.<locals>.inner_mask": (
        ("chunk_size", "left_padding"),
        lambda size, padding: Pattern(chunk=size, chunk_start=padding),
    ),
    "packed_sequence_mask_function.<locals>.inner_mask": (
        ("packed_sequence_mask",),
        lambda ids: Pattern(segments=ids),
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": (("mask_function", "position_ids"), _remapped),
}
