"""Backward calls as users make them, and some that one kernel is compared with another in: what
`python -m benchmarks.backward` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import Intervals
from fastattn.bench.users.calls import FP32, Row, Tensors, alibi, bias, slopes


@dataclass(frozen=True)
class Own(Row):
    """A call that torch's function does not have, nor a row words for."""

    #: More arguments of the op: they make tensors.
    options: dict[str, Callable[[Row, torch.device], Any]] = field(default_factory=dict)

    def ours(self, x: Tensors) -> dict[str, Any]:
        return super().ours(x) | {name: make(self, x.q.device) for name, make in self.options.items()}

    def theirs(self, x: Tensors) -> None:
        return None


def alibi_row(row: Row, device: torch.device) -> Tensor:
    """Of keys alone, as ALiBi may be under a causal mask: what a row adds to all its scores does not count."""
    return (slopes(row, device) * torch.arange(row.sizes[4], device=device)).to(row.dtype)[None]


def prefixes(row: Row, device: torch.device) -> Intervals:
    """Each query sees a prefix of its own, in no order."""
    shape, generator = (row.sizes[0], row.sizes[3]), torch.Generator(device).manual_seed(7)
    ends = torch.randint(1, row.sizes[4] + 1, shape, device=device, dtype=torch.int32, generator=generator)
    return Intervals(torch.zeros_like(ends), ends)


def windows(row: Row, device: torch.device) -> Intervals:
    """A window of 1024 keys that moves, as Intervals."""
    hi = (torch.arange(row.sizes[3], device=device)[None] + 1).int().expand(row.sizes[0], -1)
    return Intervals((hi - 1024).clamp(min=0), hi)


def drawn_lengths() -> list[int]:
    """20 lengths from 300 to 8192, each as likely as any other on a logarithmic scale."""
    numbers = torch.rand(20, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    return sorted(int(300 * (8192 / 300) ** float(x)) for x in numbers)


_TRAIN: dict[str, Any] = {"who": "training", "training": True}
_CAUSAL = _TRAIN | {"causal": True}

ROWS = [
    Row("BERT padding B32 384", sizes=(32, 12, 12, 384, 384, 64, 64), lengths=True, as_mask=True, **_TRAIN),
    Row("T5 bias B8 512", sizes=(8, 12, 12, 512, 512, 64, 64), mask=bias, mask_gradient=True, **_TRAIN),
    Row("Swin B1024 49", sizes=(1024, 8, 8, 49, 49, 32, 32), mask=bias, mask_gradient=True, **_TRAIN),
    Row("ALiBi full 2048", sizes=(1, 32, 32, 2048, 2048, 128, 128), mask=alibi, **_TRAIN),
    Own("ALiBi keys 2048", sizes=(1, 32, 32, 2048, 2048, 128, 128), window=(-1, 0), options={"mask": alibi_row},
        **_TRAIN),
    Row("softcap 2048", sizes=(1, 32, 8, 2048, 2048, 128, 128), softcap=50.0, **_CAUSAL),
    Row("softcap off 2048", sizes=(1, 32, 8, 2048, 2048, 128, 128), **_CAUSAL),
    Row("causal B2 2048", sizes=(2, 32, 8, 2048, 2048, 128, 128), **_CAUSAL),
    Row("packed 50 in 8192", sizes=(1, 32, 8, 8192, 8192, 128, 128), packed=50, **_CAUSAL),
    Row("left-padded 8x2048", sizes=(8, 32, 8, 2048, 2048, 128, 128), left_padded=True, **_CAUSAL),
    Row("B16 512", sizes=(16, 32, 8, 512, 512, 128, 128), **_CAUSAL),
    Row("full 24x4608", sizes=(1, 24, 24, 4608, 4608, 128, 128), **_TRAIN),
    Row("ViT B64 257", sizes=(64, 16, 16, 257, 257, 64, 64), **_TRAIN),
    Row("fp32 2048", sizes=(1, 32, 8, 2048, 2048, 128, 128), dtype=FP32, **_CAUSAL),
    Row("256 2048", sizes=(1, 16, 8, 2048, 2048, 256, 256), **_CAUSAL),
    Own("Intervals prefixes 2048", sizes=(1, 32, 8, 2048, 2048, 128, 128), options={"mask": prefixes}, **_TRAIN),
    Own("Intervals window 8192", sizes=(1, 32, 8, 8192, 8192, 128, 128), options={"mask": windows}, **_TRAIN),
    *(Row(f"causal B{batch} {heads}/{kv_heads} S{n}", sizes=(batch, heads, kv_heads, n, n, 128, 128), **_CAUSAL)
      for batch in (1, 2, 4) for heads, kv_heads in ((32, 8), (16, 16)) for n in drawn_lengths()),
]  # fmt: skip
