"""Forward calls as users make them: what `python -m benchmarks.forward` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import Segments

BF16, FP32 = torch.bfloat16, torch.float32
Make = Callable[["Row", torch.device], Any]


@dataclass(frozen=True)
class Row:
    """One kind of call."""

    name: str
    sizes: tuple[int, ...]  #: batch, query heads, K/V heads, queries, keys, head dim, value dim
    ours: dict[str, Any] = field(default_factory=dict)  #: arguments of the op; callables make tensors
    theirs: dict[str, Any] | None = field(default_factory=dict)  #: of torch's function; None: it has no such call
    dtype: torch.dtype = BF16

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, token-major in memory."""
        batch, heads, kv_heads, q_len, kv_len, dim, value_dim = self.sizes

        def made(heads: int, length: int, dim: int) -> Tensor:
            return torch.randn(batch, length, heads, dim, device=device, dtype=self.dtype).transpose(1, 2)

        return made(heads, q_len, dim), made(kv_heads, kv_len, dim), made(kv_heads, kv_len, value_dim)

    def arguments(self, which: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The arguments with their tensors made."""
        return {name: x(self, device) if callable(x) else x for name, x in which.items()}


def _square(row: Row, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys."""
    return torch.arange(row.sizes[3], device=device)[:, None], torch.arange(row.sizes[4], device=device)[None]


def causal_bool(row: Row, device: torch.device) -> Tensor:
    i, j = _square(row, device)
    return j <= i


def causal_float(row: Row, device: torch.device) -> Tensor:
    """As models make it: 0 and the least number, one matrix for each batch entry."""
    hidden = ~causal_bool(row, device)
    mask = torch.zeros(hidden.shape, dtype=row.dtype, device=device)
    return mask.masked_fill(hidden, torch.finfo(row.dtype).min).expand(row.sizes[0], 1, -1, -1).contiguous()


def prefix(row: Row, device: torch.device) -> Tensor:
    """A quarter of the tokens is seen by all."""
    i, j = _square(row, device)
    return (j <= i) | (j < row.sizes[4] // 4)


def alibi(row: Row, device: torch.device) -> Tensor:
    i, j = _square(row, device)
    slopes = 2.0 ** (-8.0 * torch.arange(1, row.sizes[1] + 1, device=device) / row.sizes[1])
    bias = -slopes[:, None, None] * (i - j)
    return bias.masked_fill(j > i, -torch.inf).to(row.dtype)[None]


def bias(row: Row, device: torch.device) -> Tensor:
    return torch.randn(1, row.sizes[1], row.sizes[3], row.sizes[4], device=device, dtype=row.dtype)


def lengths(row: Row, device: torch.device) -> Tensor:
    """From a quarter to all of the keys."""
    return torch.linspace(row.sizes[4] // 4, row.sizes[4], row.sizes[0], device=device).int()


def padding(row: Row, device: torch.device) -> Tensor:
    """The same as a bool tensor `[B, 1, 1, Skv]`."""
    return (torch.arange(row.sizes[4], device=device) < lengths(row, device)[:, None])[:, None, None]


def left_padded(row: Row, device: torch.device) -> Segments:
    return Segments.left_padded(row.sizes[4] - lengths(row, device), row.sizes[3], row.sizes[4], causal=True)


def packed(row: Row, device: torch.device) -> Segments:
    """50 sequences of different lengths."""
    cuts = torch.randperm(row.sizes[3] - 1, generator=torch.Generator().manual_seed(3))[:49].sort().values + 1
    cuts = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([row.sizes[3]])])
    return Segments.packed(cuts.int().to(device), causal=True)


def sinks(row: Row, device: torch.device) -> Tensor:
    return torch.randn(row.sizes[1], device=device, dtype=row.dtype)


_CAUSAL, _THEIRS = {"mask": "causal"}, {"is_causal": True}

ROWS = [
    *(Row(f"causal {n}", (1, 32, 8, n, n, 128, 128), _CAUSAL, _THEIRS) for n in (128, 256, 512, 1000, 2048, 4096)),
    *(Row(f"causal {n}", (1, 32, 8, n, n, 128, 128), _CAUSAL, _THEIRS) for n in (8192, 16384)),
    Row("B16 512", (16, 32, 8, 512, 512, 128, 128), _CAUSAL, _THEIRS),
    Row("chunk 512/4096", (1, 32, 8, 512, 4096, 128, 128), _CAUSAL, None),
    Row("chunk 32/4096", (1, 32, 8, 32, 4096, 128, 128), _CAUSAL, None),
    Row("lse 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL | {"return_lse": True}, None),
    Row("sinks 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL | {"sinks": sinks}, None),
    Row("softcap 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL | {"softcap": 50.0}, None),
    Row("window 1024 8192", (1, 32, 8, 8192, 8192, 128, 128), {"window": (1023, 0)}, None),
    Row("full 1024", (1, 24, 24, 1024, 1024, 128, 128)),
    Row("Flux 4608", (1, 24, 24, 4608, 4608, 128, 128)),
    Row("SDXL self 4096", (2, 10, 10, 4096, 4096, 64, 64)),
    Row("SDXL cross 4096/77", (2, 10, 10, 4096, 77, 64, 64)),
    Row("ViT B64 257", (64, 16, 16, 257, 257, 64, 64)),
    Row("SAM B25 196", (25, 16, 16, 196, 196, 80, 80)),
    Row("Whisper 1500", (8, 20, 20, 1500, 1500, 64, 64)),
    Row("gpt-oss window 4096", (1, 64, 8, 4096, 4096, 64, 64), {"window": (127, 0), "sinks": sinks}, None),
    Row("192/128 4096", (1, 32, 32, 4096, 4096, 192, 128), _CAUSAL, _THEIRS),
    Row("256 4096", (1, 16, 8, 4096, 4096, 256, 256), _CAUSAL, _THEIRS),
    Row("512 2048", (1, 8, 1, 2048, 2048, 512, 512), _CAUSAL, _THEIRS),
    Row("fp32 2048", (1, 32, 8, 2048, 2048, 128, 128), _CAUSAL, _THEIRS, FP32),
    Row("fp32 full 1024", (4, 12, 12, 1024, 1024, 64, 64), {}, {}, FP32),
    Row("BERT lengths B32 384", (32, 12, 12, 384, 384, 64, 64), {"kv_lengths": lengths}, {"attn_mask": padding}),
    Row("BERT padding B32 384", (32, 12, 12, 384, 384, 64, 64), {"mask": padding}, {"attn_mask": padding}),
    Row("T5 bias B8 512", (8, 12, 12, 512, 512, 64, 64), {"mask": bias}, {"attn_mask": bias}),
    Row("ALiBi 2048", (1, 32, 8, 2048, 2048, 128, 128), {"mask": alibi}, {"attn_mask": alibi}),
    Row("causal as bool 2048", (1, 32, 8, 2048, 2048, 128, 128), {"mask": causal_bool}, {"attn_mask": causal_bool}),
    Row("causal as bf16 2048", (2, 32, 8, 2048, 2048, 128, 128), {"mask": causal_float}, {"attn_mask": causal_float}),
    Row("prefix 2048", (1, 32, 8, 2048, 2048, 128, 128), {"mask": prefix}, {"attn_mask": prefix}),
    Row("Swin B1024 49", (1024, 8, 8, 49, 49, 32, 32), {"mask": bias}, {"attn_mask": bias}),
    Row("left-padded 8x2048", (8, 32, 8, 2048, 2048, 128, 128), {"mask": left_padded}, None),
    Row("packed 50 in 8192", (1, 32, 8, 8192, 8192, 128, 128), {"mask": packed}, None),
]  # fmt: skip
