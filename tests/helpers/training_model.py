"""A language model small enough to train in a test: attention through the op, sinks and all.

Its attention is an argument, so that the same weights train on the op and on attention written down plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastattn

VOCABULARY = 29
IGNORED = -100  #: the label of a token whose prediction does not count


def plainly(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """The op as `naive` writes it down: in float64, every score in memory, gradients by autograd."""
    wide = (x.double() for x in (q, k, v))
    return naive.attention(*wide, sinks=sinks, **options).out.to(q.dtype)


class Attention(nn.Module):
    """`[B, S, width]` to the same. The projection is fused: q, k and v are strided views of its result."""

    def __init__(self, width: int, heads: int, kv_heads: int, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.sinks = nn.Parameter(torch.randn(heads))
        self.attend = attend

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv(x).split(self.sizes, -1))
        out = self.attend(q, k, v, sinks=self.sinks, **options)
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, kv_heads, attend)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        x = x + self.attention(self.before(x), **options)
        return x + self.mlp(self.between(x))


class TinyLM(nn.Module):
    """Logits `[B, S, VOCABULARY]` of token ids and positions `[B, S]`. Keyword arguments go to the op.

    use_reentrant: None, or which of torch's two kinds of activation checkpointing each layer is wrapped in.
    """

    def __init__(
        self,
        attend: Callable[..., Any] = fastattn.scaled_dot_product_attention,
        *,
        width: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        longest: int = 64,
        use_reentrant: bool | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList([Layer(width, heads, kv_heads, attend) for _ in range(layers)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.use_reentrant = use_reentrant

    def forward(self, ids: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x = self.tokens(ids) + self.positions(positions)
        for layer in self.layers:
            if self.use_reentrant is None:
                x = layer(x, options)
            else:
                x = checkpoint(layer, x, options, use_reentrant=self.use_reentrant)
        return self.head(x)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens that count. labels: `[B, S]`, the token after each."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def next_tokens(ids: Tensor) -> Tensor:
    """Labels for sequences without padding: the last token of each predicts nothing."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)
