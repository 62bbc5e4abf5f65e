"""The rotary embedding that `flash_attn_with_kvcache` applies."""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import work_dtype


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x `[B, S, H, D]` with its first R numbers rotated, in x's dtype; computed in float32 (float64 for float64).

    cos, sin: `[rows, R / 2]`. positions: int32 `[B, S]`; beyond the last row the last one is taken. interleaved: the
    numbers 2i and 2i + 1 are a pair; else i and i + R/2.
    """
    work = work_dtype(x.dtype)
    positions = positions.clamp(0, max(cos.shape[0] - 1, 0))
    c, s = (table[positions].to(work)[:, :, None] for table in (cos, sin))
    size = 2 * cos.shape[1]
    turning, rest = x[..., :size].to(work), x[..., size:]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * c - b * s, a * s + b * c], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
