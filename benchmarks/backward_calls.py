"""Backward calls as users make them: what `python -m benchmarks.backward` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import Intervals, Segments
from fastattn.bench.users.calls import alibi as alibi_of
from fastattn.bench.users.calls import bias as bias_of

BF16, FP32 = torch.bfloat16, torch.float32
Make = Callable[["Backward", torch.device], Any]


@dataclass(frozen=True)
class Backward:
    """One kind of call, and the gradients that are asked for."""

    name: str
    sizes: tuple[int, ...]  #: batch, query heads, K/V heads, queries, keys, head dim, value dim
    ours: dict[str, Any] = field(default_factory=dict)  #: arguments of the op; callables make tensors
    theirs: dict[str, Any] | None = field(default_factory=dict)  #: of torch's function; None: it has no such call
    dtype: torch.dtype = BF16
    grads: str = "qkv"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, token-major in memory."""
        batch, heads, kv_heads, q_len, kv_len, dim, value_dim = self.sizes

        def made(heads: int, length: int, dim: int) -> Tensor:
            return torch.randn(batch, length, heads, dim, device=device, dtype=self.dtype).transpose(1, 2)

        return made(heads, q_len, dim), made(kv_heads, kv_len, dim), made(kv_heads, kv_len, value_dim)

    def arguments(self, which: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The arguments with their tensors made."""
        return {name: x(self, device) if callable(x) else x for name, x in which.items()}


def _lengths(row: Backward, device: torch.device) -> Tensor:
    return torch.linspace(row.sizes[4] // 4, row.sizes[4], row.sizes[0], device=device).int()


def padding(row: Backward, device: torch.device) -> Tensor:
    """Lengths from a quarter to all of the keys, as a bool tensor `[B, 1, 1, Skv]`."""
    return (torch.arange(row.sizes[4], device=device) < _lengths(row, device)[:, None])[:, None, None]


def left_padded(row: Backward, device: torch.device) -> Segments:
    return Segments.left_padded(row.sizes[4] - _lengths(row, device), row.sizes[3], row.sizes[4], causal=True)


def packed(row: Backward, device: torch.device) -> Segments:
    """50 sequences of different lengths."""
    cuts = torch.randperm(row.sizes[3] - 1, generator=torch.Generator().manual_seed(3))[:49].sort().values + 1
    cuts = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([row.sizes[3]])])
    return Segments.packed(cuts.int().to(device), causal=True)


def alibi(row: Backward, device: torch.device) -> Tensor:
    return alibi_of(row, device)  # type: ignore[arg-type]  # it reads sizes and dtype


def bias(row: Backward, device: torch.device) -> Tensor:
    return bias_of(row, device)  # type: ignore[arg-type]


def alibi_row(row: Backward, device: torch.device) -> Tensor:
    """Of keys alone, as ALiBi may be under a causal mask: what a row adds to all its scores does not count."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, row.sizes[1] + 1, device=device) / row.sizes[1])
    return (slopes[:, None, None] * torch.arange(row.sizes[4], device=device)).to(row.dtype)[None]


def prefixes(row: Backward, device: torch.device) -> Intervals:
    """Each query sees a prefix of its own, in no order."""
    ends = torch.randint(1, row.sizes[4] + 1, (row.sizes[0], row.sizes[3]), device=device, dtype=torch.int32)
    return Intervals(torch.zeros_like(ends), ends)


def windows(row: Backward, device: torch.device) -> Intervals:
    """A window of 1024 keys that moves, as Intervals."""
    hi = (torch.arange(row.sizes[3], device=device)[None] + 1).int().expand(row.sizes[0], -1)
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
