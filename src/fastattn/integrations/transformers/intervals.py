"""The interval of keys that each query sees: computed from a Pattern, or by evaluating an unknown mask function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .patterns import Pattern

SCAN_ELEMENTS = 1 << 22  #: entries of an unknown mask function evaluated at a time


class Padding(NamedTuple):
    """A 2-D attention mask whose True entries lie together: key j of row b is real when `first[b] <= j < stop[b]`."""

    first: Tensor  #: [B, 1]
    stop: Tensor  #: [B, 1]
    latest_first: int
    earliest_stop: int


def real_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """The entries of a 2-D mask that belong to the keys, bool `[B, Skv]`."""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _runs(seen: Tensor) -> Tensor:
    """The number of runs of True along the last dim."""
    return (seen[..., 1:] & ~seen[..., :-1]).sum(-1) + seen[..., :1].sum(-1)


def find_padding(real: Tensor) -> Padding | None:
    """The first and last real keys of each row; None when a row has holes. Waits for the device once."""
    first = real.to(torch.uint8).argmax(-1, keepdim=True)
    stop = first + real.sum(-1, keepdim=True)
    runs, latest_first, earliest_stop = torch.stack([_runs(real).max(), first.max(), stop.min()]).tolist()
    return None if runs > 1 else Padding(first, stop, latest_first, earliest_stop)


def intervals_of(
    pattern: Pattern, positions: Tensor, kv_offset: int, kv_length: int, padding: Padding | None
) -> tuple[Tensor, Tensor]:
    """First visible key and one past the last one of each query, as indices into the keys: two `[1 | B, Sq | 1]`."""
    lo, hi = pattern.bounds(positions)
    nothing = torch.zeros_like(positions)
    lo = nothing if lo is None else lo - kv_offset
    hi = nothing + kv_length if hi is None else hi - kv_offset
    if padding is not None:
        lo, hi = torch.maximum(lo, padding.first), torch.minimum(hi, padding.stop)
    return lo.clamp(0, kv_length), hi.clamp(0, kv_length)


def scan(
    mask_function: Callable[..., Any],
    batch_size: int,
    positions: Tensor,
    kv_length: int,
    kv_offset: int,
    real: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Evaluates a mask function of indices, a few queries at a time: the interval of each query, `lo` and `hi`; None
    where the keys of some query are no interval.

    Computes Sq x Skv entries, stores O(S). Waits for the device once.
    """
    device = positions.device
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None]
    bounds, fits = [], []
    for rows in positions[0].split(max(1, SCAN_ELEMENTS // max(1, batch_size * kv_length))):
        seen = mask_function(batch, head, rows[None, None, :, None], keys)
        if real is not None:
            seen = seen & real[:, None, None]
        seen = seen.expand(batch_size, 1, rows.shape[0], kv_length)[:, 0]
        first = seen.to(torch.uint8).argmax(-1)
        bounds.append(torch.stack([first, first + seen.sum(-1)]))
        fits.append((_runs(seen) <= 1).all())
    if not bool(torch.stack(fits).all()):
        return None
    lo, hi = torch.cat(bounds, -1)
    return lo, hi
