"""Attention written down plainly in float64: every score in memory, every rule of the contract on a line of its own.

The reference of the CPU tests. It shares no code with the package, and its gradients are autograd's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


def visible(
    q: Tensor,
    k: Tensor,
    *,
    mask: Any = None,
    window: tuple[int, int] | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool `[B, Hq or 1, Sq, Skv]`. Takes the op's arguments of these names."""
    batch, _, rows, _ = q.shape
    keys = k.shape[2]
    left, right = window or (-1, -1)
    i = torch.arange(rows, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)[None, :]
    entries = []
    for b in range(batch):
        there_q = rows if q_lengths is None else min(max(int(q_lengths[b]), 0), rows)
        there_kv = keys if kv_lengths is None else min(max(int(kv_lengths[b]), 0), keys)
        seen = (i < there_q) & (j < there_kv)
        position = i + there_kv - there_q
        if left >= 0:
            seen = seen & (j >= position - left)
        if right >= 0:
            seen = seen & (j <= position + right)
        if isinstance(mask, str):
            seen = seen & (j <= position)
        elif hasattr(mask, "table"):  # Segments
            seen = torch.zeros(rows, keys, dtype=torch.bool, device=q.device)
            for column in mask.table.T.tolist():
                row, *ends = column if len(column) % 2 else (0, *column)
                q_start, q_stop, kv_start, kv_stop = (
                    min(max(x, 0), n) for x, n in zip(ends * (4 // len(ends)), (rows, rows, keys, keys), strict=True)
                )
                position = i - q_stop + kv_stop
                inside = (i >= q_start) & (i < q_stop) & (j >= kv_start) & (j < kv_stop)
                if left >= 0:
                    inside = inside & (j >= position - left)
                if right >= 0:
                    inside = inside & (j <= position + right)
                if mask.causal:
                    inside = inside & (j <= position)
                seen = seen | (inside & (row == b))
        elif isinstance(mask, tuple):  # Intervals
            lo, hi = (x.expand(batch, rows)[b][:, None] for x in mask)
            seen = seen & (j >= lo) & (j < hi)
        entries.append(seen)
    seen = torch.stack(entries)[:, None] if entries else torch.ones(0, 1, rows, keys, dtype=torch.bool, device=q.device)
    if isinstance(mask, Tensor):
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return seen


class Result(NamedTuple):
    """out `[B, Hq, Sq, Dv]` and lse `[B, Hq, Sq]`, float64."""

    out: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Any = None,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Result:
    """The op on float64 tensors, with gradients by autograd. q, k, v must be finite everywhere."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    folded = (batch, kv_heads, heads // kv_heads * rows)  # rows of the heads that share a K/V head, neighbours
    seen = visible(q, k, mask=mask, window=window, q_lengths=q_lengths, kv_lengths=kv_lengths)
    seen = seen.expand(batch, heads, rows, keys)
    scores = (q.reshape(*folded, dim) @ k.mT).view(batch, heads, rows, keys)
    scores = scores * (1 / math.sqrt(dim or 1) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        scores = scores + mask.double().masked_fill(mask == -math.inf, 0.0)
    # One more column, the sink; without sinks its logit is -inf in rows that see something, and 0 in rows that do not,
    # so that no softmax is taken over nothing but -inf (whose gradient is NaN).
    fully_masked = ~seen.any(-1)
    if sinks is None:
        sink = torch.where(fully_masked, 0.0, -math.inf).to(scores)
    else:
        sink = sinks.double()[:, None].expand(batch, heads, rows)
    logits = torch.cat([scores.masked_fill(~seen, -math.inf), sink[..., None]], -1)
    top = logits.amax(-1, keepdim=True).detach()
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    probabilities = (weights / total)[..., :-1].masked_fill(~seen, 0.0)
    lse = (top + torch.log(total)).squeeze(-1)  # torch.logsumexp's gradient is exp(s - lse): wrong where s is finfo.min
    if sinks is None:
        lse = lse.masked_fill(fully_masked, -math.inf)
    out = (probabilities.reshape(*folded, keys) @ v).view(batch, heads, rows, v.shape[-1])
    return Result(out, lse)
