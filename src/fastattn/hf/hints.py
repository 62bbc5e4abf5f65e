"""What a mask made by `mask.interval_mask` carries along: the same in the words of the fastest kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat.torch import changes
from ..masks import Segments

_HINT = "_fastattn_hint"


class Band(NamedTuple):
    """The same mask as its tensor, in other words: of the first `keys` keys, the query at position p sees
    `[p - left, p + right]` (-1 = open), the last query standing on the last of these keys."""

    keys: int
    left: int
    right: int


class Pieces(NamedTuple):
    """The same mask as its tensor for all queries that are no padding: causal segments, within a window.

    Padding sees nothing here, what it sees in the tensor is nobody's business.
    """

    segments: Segments
    left: int  #: -1 = open


class Filled(NamedTuple):
    """A mask for one query per row: of the first `lengths[b]` keys it sees all, or those of the mask tensor if that is
    dense. On the device: as true in a captured graph as outside of one."""

    lengths: Tensor  #: int32 [B]


Hint = Band | Pieces | Filled


def attach(mask: Tensor, hint: Hint) -> Tensor:
    """The mask, with the hint. It must not have been made in inference mode: such tensors do not tell when they
    change."""
    setattr(mask, _HINT, (hint, changes(mask)))
    return mask


def hint_of(mask: Tensor) -> Hint | None:
    """The same in other words, of a mask made here; None if there are none, or it was changed in place since."""
    hint, version = getattr(mask, _HINT, (None, 0))
    return hint if hint is not None and changes(mask) == version else None


def pack(lo: Tensor, hi: Tensor, batch_size: int, hint: Hint | None) -> Tensor:
    """int32 `[B, 1, Sq | 1, 2]`, laid out so that lo and hi are each contiguous `[B, Sq | 1]`."""
    lo, hi = (x.to(torch.int32).expand(batch_size, -1) for x in torch.broadcast_tensors(lo, hi))
    if torch.compiler.is_compiling():
        return torch.stack([lo, hi]).permute(1, 2, 0)[:, None]
    with torch.inference_mode(False):
        mask = torch.stack([lo, hi]).permute(1, 2, 0)[:, None]
    return mask if hint is None else attach(mask, hint)


def segments_between(first: Tensor, end: Tensor, start: Tensor, queries: int, base: Any, keys: int) -> Segments:
    """Causal segments of the tokens `first .. end - 1`, `[B, n]` each, in order; what is not below `end` is empty.

    start: `[B, 1]`, the token that the first query is. base: the token that the first key is. The tokens before
    `start` are keys only.
    """
    batch, count = torch.broadcast_shapes(first.shape, end.shape, start.shape)
    row = torch.arange(batch, device=start.device)[:, None]
    q_first, k_first = (first - start).clamp(0, queries), (first - base).clamp(0, keys)
    q_end = torch.maximum((end - start).clamp(0, queries), q_first)
    k_end = torch.maximum((end - base).clamp(0, keys), k_first)
    parts = [x.expand(batch, count).to(torch.int32) for x in (row, q_first, q_end, k_first, k_end)]
    return Segments(torch.stack(parts).flatten(1), causal=True)


def chunks(
    chunk: int, begin: Tensor, first: Tensor, end: Tensor, start: Tensor, queries: int, base: Any, keys: int
) -> Segments:
    """The chunks of so many tokens, counted from `begin`, that the queries are in: a segment each, within
    `first .. end - 1`. All but the number of queries is known to the device alone: some segments may be empty."""
    count = (queries - 2) // chunk + 2
    cuts = start - (start - begin).remainder(chunk) + chunk * torch.arange(count + 1, device=start.device)
    return segments_between(
        torch.maximum(cuts[:, :-1], first), torch.minimum(cuts[:, 1:], end), start, queries, base, keys
    )
