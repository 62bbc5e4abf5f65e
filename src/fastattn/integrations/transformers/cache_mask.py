"""The mask over the keys of a `StaticCache`: computed from lengths on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._compat.hf import is_tracing
from ...masks import Intervals
from .device_offset import DeviceOffset
from .intervals import Padding, find_padding
from .lazy_mask import CausalSegments, LiveKeys
from .patterns import Pattern, recognise
from .segments import chunk_segments, segments_between


def mask_of_cache(
    offset: DeviceOffset, queries: int, keys: int, mask_function: Callable[..., Any], attention_mask: Tensor | None
) -> tuple[Intervals | Tensor, CausalSegments | LiveKeys | None]:
    """The keys that the queries of one layer type see, as the fields of `lazy_mask.Compact`: `visible` and `hint`.

    mask_function, attention_mask: as of `interval_mask`. One query never waits for the device; several wait if there
    is padding.
    """
    pattern = recognise(mask_function)
    if pattern is not None and pattern.segments is None:
        if queries == 1 and attention_mask is None:
            hint = _live_keys(offset, keys, pattern)
            if hint is not None:
                hi = hint.lengths[:, None]
                return Intervals(torch.zeros_like(hi), hi), hint
        elif queries > 1 and (attention_mask is None or not is_tracing(attention_mask)):
            padding = None if attention_mask is None else find_padding(attention_mask.bool())
            if attention_mask is None or padding is not None:
                return _intervals(offset, queries, keys, pattern, padding)
    seen = _dense(offset, queries, keys, mask_function, attention_mask)
    whole = queries == 1 and not offset.window
    return seen, LiveKeys((offset.starts + 1).clamp_(max=keys)) if whole else None


def _live_keys(offset: DeviceOffset, keys: int, pattern: Pattern) -> LiveKeys | None:
    """The keys that one query sees without padding, None unless these are the first so many."""
    chunk = 0 if pattern.chunk > keys else pattern.chunk
    if (0 <= pattern.left < keys - 1) or chunk not in (0, offset.window):
        return None
    starts = offset.starts.remainder(chunk) if chunk else offset.starts
    return LiveKeys((starts + 1).clamp_(max=keys))


def _intervals(
    offset: DeviceOffset, queries: int, keys: int, pattern: Pattern, padding: Padding | None
) -> tuple[Intervals, CausalSegments | None]:
    """The keys that several queries see. padding: of the row's tokens."""
    base, start = offset.first_key(), offset.starts.long()[:, None]
    first, end = torch.zeros_like(start), start + queries
    if padding is not None:
        first, end = torch.maximum(first, padding.first), torch.minimum(end, padding.stop)
    if offset.window:
        first = torch.maximum(first, base)
    lo, hi = pattern.bounds(offset.positions(queries))
    lo = first if lo is None else torch.maximum(lo, first)
    hi = end if hi is None else torch.minimum(hi, end)
    hint = None
    if pattern.right == 0:
        around = (first, end, start, queries, base, keys)
        begin = first.new_zeros(()) if pattern.chunk_start is None else pattern.chunk_start[:, None]
        segments = chunk_segments(pattern.chunk, begin, *around) if pattern.chunk else segments_between(*around)
        hint = CausalSegments(segments, -1 if pattern.left >= keys - 1 else pattern.left)
    bounds = ((x - base).clamp(0, keys).to(torch.int32) for x in torch.broadcast_tensors(lo, hi))
    return Intervals(*(x.contiguous() for x in bounds)), hint


def _dense(
    offset: DeviceOffset,
    queries: int,
    keys: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
) -> Tensor:
    """bool `[B, 1, Sq, Skv]`: a mask function of indices, evaluated at the positions of the keys that are tokens.

    attention_mask: bool `[B, tokens]`; missing tokens count as padding.
    """
    starts = offset.starts.long()
    batch = starts.shape[0]
    position = offset.key_positions(queries, keys)
    there = (position >= 0) & (position < starts[:, None] + queries)
    position = position.clamp(min=0)
    if attention_mask is not None:
        width = attention_mask.shape[1]
        index = position.clamp(max=width - 1).expand(batch, -1)
        there = there & (position < width) & attention_mask.to(starts.device).bool().gather(1, index)
    row = torch.arange(batch, device=starts.device)[:, None, None, None]
    seen = mask_function(
        row, torch.zeros_like(row), offset.positions(queries)[:, None, :, None], position[:, None, None]
    )
    return (seen & there[:, None, None]).expand(batch, 1, queries, keys)
