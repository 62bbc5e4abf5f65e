"""Backward calls as users make them: what `python -m benchmarks.backward` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import Intervals

from .forward_calls import FP32, Row, _square, alibi, bias, left_padded, packed, padding


@dataclass(frozen=True)
class Backward(Row):
    """One kind of call, and the gradients that are asked for."""

    grads: str = "qkv"


def alibi_row(row: Row, device: torch.device) -> Tensor:
    """Of keys alone, as ALiBi may be under a causal mask: what a row adds to all its scores does not count."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, row.sizes[1] + 1, device=device) / row.sizes[1])
    return (slopes[:, None, None] * torch.arange(row.sizes[4], device=device)).to(row.dtype)[None]


def prefixes(row: Row, device: torch.device) -> Intervals:
    """Each query sees a prefix of its own, in no order."""
    ends = torch.randint(1, row.sizes[4] + 1, (row.sizes[0], row.sizes[3]), device=device, dtype=torch.int32)
    return Intervals(torch.zeros_like(ends), ends)


def windows(row: Row, device: torch.device) -> Intervals:
    """A window of 1024 keys that moves, as Intervals."""
    i, _ = _square(row, device)
    hi = (i.T + 1).int().expand(row.sizes[0], -1)
    return Intervals((hi - 1024).clamp(min=0), hi)


def drawn_lengths() -> list[int]:
    """20 lengths from 300 to 8192, each as likely as any other on a logarithmic scale."""
    numbers = torch.rand(20, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    return sorted(int(300 * (8192 / 300) ** float(x)) for x in numbers)


_CAUSAL: dict[str, Any] = {"mask": "causal"}
_THEIRS: dict[str, Any] = {"is_causal": True}

ROWS = [
    Backward("BERT padding B32 384", (32, 12, 12, 384, 384, 64, 64), {"mask": padding}, {"attn_mask": padding}),
    Backward("T5 bias B8 512", (8, 12, 12, 512, 512, 64, 64), {"mask": bias, "scale": 1.0},
             {"attn_mask": bias, "scale": 1.0}, grads="qkvm"),
    Backward("Swin B1024 49", (1024, 8, 8, 49, 49, 32, 32), {"mask": bias}, {"attn_mask": bias}, grads="qkvm"),
    Backward("ALiBi full 2048", (1, 32, 32, 2048, 2048, 128, 128), {"mask": alibi}, {"attn_mask": alibi}),
    Backward("ALiBi keys 2048", (1, 32, 32, 2048, 2048, 128, 128), {"mask": alibi_row, "window": (-1, 0)}, None),
    Backward("softcap 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL | {"softcap": 50.0}, None),
    Backward("softcap off 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL, _THEIRS),
    Backward("causal B2 2048", (2, 32, 8, 2048, 2048, 128, 128), _CAUSAL, _THEIRS),
    Backward("packed 50 in 8192", (1, 32, 8, 8192, 8192, 128, 128), {"mask": packed}, None),
    Backward("left-padded 8x2048", (8, 32, 8, 2048, 2048, 128, 128), {"mask": left_padded}, None),
    Backward("B16 512", (16, 32, 8, 512, 512, 128, 128), _CAUSAL, _THEIRS),
    Backward("full 24x4608", (1, 24, 24, 4608, 4608, 128, 128)),
    Backward("ViT B64 257", (64, 16, 16, 257, 257, 64, 64)),
    Backward("fp32 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL, _THEIRS, FP32),
    Backward("256 2048", (1, 16, 8, 2048, 2048, 256, 256), _CAUSAL, _THEIRS),
    Backward("Intervals prefixes 2048", (1, 32, 8, 2048, 2048, 128, 128), {"mask": prefixes}, None),
    Backward("Intervals window 8192", (1, 32, 8, 8192, 8192, 128, 128), {"mask": windows}, None),
    *(Backward(f"causal B{batch} {heads}/{kv_heads} S{n}", (batch, heads, kv_heads, n, n, 128, 128), _CAUSAL, _THEIRS)
      for batch in (1, 2, 4) for heads, kv_heads in ((32, 8), (16, 16)) for n in drawn_lengths()),
]  # fmt: skip
