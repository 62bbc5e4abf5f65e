"""`Segments` of the tokens around the queries of one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...masks import Segments


def segments_between(first: Tensor, end: Tensor, start: Tensor, queries: int, base: Any, keys: int) -> Segments:
    """Causal segments of the tokens `first .. end - 1`, `[B, n]` each, in order; empty where `first >= end`.

    start: `[B, 1]`, the position of the first query. base: the position of the first key. The tokens before `start`
    are keys only. Tokens past the last key are those of a row that has no room for them: nothing stands for them, or
    the last query would not stand on the last key.
    """
    end = end.clamp(max=base + keys)
    batch, count = torch.broadcast_shapes(first.shape, end.shape, start.shape)
    row = torch.arange(batch, device=start.device)[:, None]
    q_first, k_first = (first - start).clamp(0, queries), (first - base).clamp(0, keys)
    q_end = torch.maximum((end - start).clamp(0, queries), q_first)
    k_end = torch.maximum((end - base).clamp(0, keys), k_first)
    parts = [x.expand(batch, count).to(torch.int32) for x in (row, q_first, q_end, k_first, k_end)]
    return Segments(torch.stack(parts).flatten(1), causal=True)


def chunk_segments(
    chunk: int, begin: Tensor, first: Tensor, end: Tensor, start: Tensor, queries: int, base: Any, keys: int
) -> Segments:
    """The chunks of `chunk` tokens, counted from `begin`, that the queries are in: a segment each, within
    `first .. end - 1`. Only the number of queries is known on the host, so some segments may be empty."""
    count = (queries - 2) // chunk + 2
    cuts = start - (start - begin).remainder(chunk) + chunk * torch.arange(count + 1, device=start.device)
    return segments_between(
        torch.maximum(cuts[:, :-1], first), torch.minimum(cuts[:, 1:], end), start, queries, base, keys
    )
