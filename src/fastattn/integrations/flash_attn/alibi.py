"""ALiBi slopes as an additive mask: flash-attn adds `-slope * |i + Skv - Sq - j|` to the score of query i and key j.

Where no query sees a key behind its own position (causal, or one query), |p - j| is p - j with p = i + Skv - Sq. The
softmax does not notice what is added to a whole row, so `slope * j` says the same: H * Skv numbers instead of
H * Sq * Skv. Only the log-sum-exp notices, and is corrected; and sinks, which are not shifted with their row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.checks import check_tensor
from .arguments import Options


class Alibi(NamedTuple):
    """The bias of one call."""

    mask: Tensor  #: to add to the scores, `[B|1, H, Sq|1, Skv]`
    missing: Tensor | None  #: what the rows' log-sum-exp lacks, `[B|1, H, Sq]`; None: nothing


def check_slopes(slopes: Any, batch: int, q: Tensor) -> None:
    """Raises unless slopes are floating, `[Hq]` or `[batch, Hq]`, on q's device. q: `[..., Hq, D]`."""
    check_tensor("alibi_slopes", slopes)
    heads = q.shape[-2]
    if not slopes.is_floating_point() or tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected floating [{heads}] or [{batch}, {heads}], got {slopes.dtype} {list(slopes.shape)}"
        )
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes: expected device {q.device} as of q, got {slopes.device}")


def bias(
    slopes: Tensor,
    q_len: int,
    kv_len: int,
    dtype: torch.dtype,
    options: Options,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    leftpad: Tensor | None = None,
) -> Alibi:
    """The bias of a call with Sq = q_len and Skv = kv_len.

    slopes: `[H]` or `[B, H]`. dtype: of q. q_lengths, kv_lengths: int32 `[B]`, as in the op; the
    positions are counted by them. leftpad: int32 `[B]`, keys before the first one, which get -inf: an additive mask
    leaves no room for Intervals.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32  # bfloat16 has 8 bits for a distance
    slopes = slopes.to(work)
    slopes = slopes[None, :, None, None] if slopes.dim() == 1 else slopes[:, :, None, None]
    keys = torch.arange(kv_len, dtype=torch.int32, device=slopes.device)
    rows = torch.arange(q_len, dtype=torch.int32, device=slopes.device)
    end: Any = kv_len if kv_lengths is None else kv_lengths.clamp(0, kv_len)[:, None]
    queries: Any = q_len if q_lengths is None else q_lengths.clamp(0, q_len)[:, None]
    position = rows + (end - queries)  # [Sq], or [B, Sq]
    position = position[None] if position.dim() == 1 else position
    missing = None
    # float32 scores are exact to 1e-7, and slope * (a distance to the last key) in float32 is not.
    if (options.right == 0 or q_len == 1) and options.sinks is None and dtype != torch.float32:
        last: Any = end - 1  # small numbers for the keys near the last one, where they matter
        last = last if isinstance(last, int) else last[:, :, None, None]
        mask = slopes * (keys - last).to(work)
        missing = (slopes * (last - position[:, None, :, None]).to(work))[..., 0]
    else:
        mask = -slopes * (position[:, :, None] - keys).abs().to(work)[:, None]
    if leftpad is not None:
        mask = mask.masked_fill((keys < leftpad[:, None])[:, None, None], -torch.inf)
    return Alibi(mask, missing)
