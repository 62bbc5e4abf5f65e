"""Models that call torch's `scaled_dot_product_attention` as timm's, diffusers', nanoGPT's and TabPFN's code does.

Written out here, with random weights, so that the measurement needs no other library and no download. What stands
around the attention is as wide as in the models they are named after; where those have many equal layers, some have
fewer of them here, which changes no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Any]


@dataclass
class Made:
    """A model, and inputs for it. `call(model, inputs)` gives the output that is compared."""

    model: nn.Module
    inputs: Inputs
    call: Callable[[nn.Module, Inputs], Tensor]
    #: of each size that comes once; () for a model of one size
    fresh: Sequence[Inputs] = ()
    trains: bool = True


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, S, H * D]` as `[B, H, S, D]`."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """`[B, H, S, D]` as `[B, S, H * D]`."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention, or attention to another sequence; q and k normalised where asked, as diffusion models have it."""

    def __init__(self, width: int, heads: int, context: int | None = None, normalised: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(context or width, width), nn.Linear(context or width, width)
        self.norms = nn.ModuleList([nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)]) if normalised else None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (_heads(y, self.heads) for y in (self.q(x), self.k(context), self.v(context)))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        return self.out(_joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)))


class VisionBlock(nn.Module):
    """timm's: one product for q, k and v, which are slices of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, w))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(tiny: bool, size: int, batch: int) -> Made:
    """ViT-L/16."""
    shape = (32, 8, 32, 4, 2) if tiny else (size, 16, 1024, 16, 24)
    images = torch.randn(2 if tiny else batch, 3, shape[0], shape[0])
    return Made(VisionTransformer(*shape), {"images": images}, lambda model, x: model(x["images"]))


class CrossBlock(nn.Module):
    """Self-attention over the image, attention to the text, and a gated MLP, as SDXL's UNet has them."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.own, self.cross = Attention(width, heads), Attention(width, heads, context)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.own(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), text)
        y, gate = self.up(self.norms[2](x)).chunk(2, dim=-1)
        return x + self.down(y * F.gelu(gate))


class UNet(nn.Module):
    """SDXL's order of things: blocks at half and at quarter resolution, with convolutions between."""

    def __init__(self, width: int, heads: int, context: int, layers: tuple[int, int]) -> None:
        super().__init__()
        self.into = nn.Conv2d(4, width, 3, 2, 1)
        self.first = nn.ModuleList(CrossBlock(width, heads, context) for _ in range(layers[0]))
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.second = nn.ModuleList(CrossBlock(2 * width, 2 * heads, context) for _ in range(layers[1]))
        self.up = nn.Conv2d(2 * width, width, 3, 1, 1)
        self.last = nn.ModuleList(CrossBlock(width, heads, context) for _ in range(layers[0]))
        self.out = nn.Conv2d(width, 4, 3, 1, 1)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        first = _over(self.first, self.into(latents), text)
        second = _over(self.second, self.down(first), text)
        x = first + F.interpolate(self.up(second), size=first.shape[-2:])
        return F.interpolate(self.out(_over(self.last, x, text)), size=latents.shape[-2:])


def _over(blocks: nn.ModuleList, image: Tensor, text: Tensor) -> Tensor:
    x = image.flatten(2).transpose(1, 2).contiguous()
    for block in blocks:
        x = block(x, text)
    return x.transpose(1, 2).unflatten(2, image.shape[-2:])


def _unet(tiny: bool, layers: tuple[int, int]) -> nn.Module:
    return UNet(16, 2, 24, (1, 1)) if tiny else UNet(640, 10, 2048, layers)


def _call_unet(model: nn.Module, x: Inputs) -> Tensor:
    found: Tensor = model(x["latents"], x["text"])
    return found


def sdxl(tiny: bool) -> Made:
    """1024 x 1024 pixels, with guidance (a batch of 2), and a text of 77 tokens."""
    inputs = _latents((16, 16), 1) if tiny else _latents((128, 128), 2)
    return Made(_unet(tiny, (4, 20)), inputs, _call_unet)


def _latents(sides: tuple[int, int], batch: int) -> Inputs:
    text = (11, 24) if max(sides) < 64 else (77, 2048)
    return {"latents": torch.randn(batch, 4, *sides), "text": torch.randn(batch, *text)}


def resolutions(tiny: bool) -> Made:
    """A pipeline that makes each image in another resolution: 20 of them, none twice."""
    if tiny:
        sides = [(16, 4 * n) for n in (3, 5, 6)]
    else:
        sides = [(96 + 8 * (i % 5), 64 + 4 * i) for i in range(20)]
    known = _latents((16, 16) if tiny else (128, 128), 1)
    return Made(_unet(tiny, (2, 10)), known, _call_unet, [_latents(own, 1) for own in sides])


class JointBlock(nn.Module):
    """Text and image in one attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, normalised=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class Joint(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def sd3(tiny: bool) -> Made:
    """SD3's: 4096 tokens of image and 333 of text."""
    model = Joint(32, 4, 2) if tiny else Joint(1536, 24, 8)
    x = torch.randn(2, 27, 32) if tiny else torch.randn(2, 4096 + 333, 1536)
    return Made(model, {"x": x}, lambda model, x: model(x["x"]))


def flux(tiny: bool) -> Made:
    """Flux's width with padded texts, of which torch gets a mask of keys."""
    text, image, width = (11, 16, 32) if tiny else (512, 4096, 3072)
    model = Joint(width, 2, 2) if tiny else Joint(width, 24, 4)
    there = torch.ones(2, 1, 1, text + image, dtype=torch.bool)
    there[0, ..., text // 4 : text] = False
    there[1, ..., text // 2 : text] = False
    inputs = {"x": torch.randn(2, text + image, width), "mask": there}
    # What padding gives is nobody's: the output is the image's.
    return Made(model, inputs, lambda model, x: model(x["x"], x["mask"])[:, text:])


class GPTBlock(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(y, self.heads) for y in self.qkv(self.norm1(x)).split(x.shape[2], dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        x = x + self.out(_joined(y))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """nanoGPT's; the head's weights are the embedding's."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(GPTBlock(heads, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.positions(places))
        return F.linear(self.norm(x), self.tokens.weight)


def gpt2(tiny: bool) -> Made:
    """GPT-2 124M, 8 sequences of 1024 tokens."""
    vocabulary, context = (61, 24) if tiny else (50304, 1024)
    model = GPT(vocabulary, context, 2, 4, 32) if tiny else GPT(vocabulary, context, 12, 12, 768)
    tokens = torch.randint(0, vocabulary, (2 if tiny else 8, context))
    return Made(model, {"tokens": tokens}, lambda model, x: model(x["tokens"]))


class BiasedBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (_heads(y, self.heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(_joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class BiasedEncoder(nn.Module):
    """T5's: one table of biases by distance, which is trained, for the attention of all layers; no scale."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words, self.distances = nn.Embedding(vocabulary, width), nn.Embedding(32, heads)
        self.blocks = nn.ModuleList(BiasedBlock(width, heads) for _ in range(layers))

    def forward(self, text: Tensor, there: Tensor | None) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        bias = self.distances((places - places[:, None]).clamp(-16, 15) + 16).permute(2, 0, 1)[None]
        if there is not None:
            bias = bias.masked_fill(~there[:, None, None], torch.finfo(bias.dtype).min)
        x = self.words(text)
        for block in self.blocks:
            x = block(x, bias)
        return x if there is None else x * there[..., None]


def biased(tiny: bool, padded: bool) -> Made:
    """8 texts of 512 tokens, 12 heads; padded: of several lengths, so that each text has its own bias."""
    batch, length = (2, 12) if tiny else (8, 512)
    model = BiasedEncoder(60, 32, 4, 2) if tiny else BiasedEncoder(32128, 768, 12, 12)
    inputs: Inputs = {"text": torch.randint(0, 60, (batch, length)), "there": None}
    if padded:
        inputs["there"] = torch.arange(length)[None] < torch.linspace(length // 2, length, batch).int()[:, None]
    return Made(model, inputs, lambda model, x: model(x["text"], x["there"]))


class TableBlock(nn.Module):
    """Attention between the columns of each row, then between the rows: all rows see those whose labels are known."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.columns, self.rows = Attention(width, heads), Attention(width, heads)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, known: int) -> Tensor:
        x = self.norms[0](x + self.columns(x))  # [rows, columns, width]
        y = x.transpose(0, 1).contiguous()
        y = self.norms[1](y + self.rows(y, y[:, :known]))
        return self.norms[2]((y + self.mlp(y)).transpose(0, 1).contiguous())


class Table(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.cells = nn.Linear(1, width)
        self.blocks = nn.ModuleList(TableBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, cells: Tensor) -> Tensor:
        x = self.cells(cells[..., None])
        for block in self.blocks:
            x = block(x, cells.shape[0] * 2 // 3)
        return self.head(x[:, -1])


def tabpfn(tiny: bool) -> Made:
    """Tables `[rows, columns]`, each of another size."""
    model = Table(24, 3, 2) if tiny else Table(192, 6, 12)
    sizes = [(9, 4), (13, 5), (17, 3)] if tiny else [(300 + 137 * i, 5 + 3 * i) for i in range(20)]
    tables: list[Inputs] = [{"cells": torch.randn(*size)} for size in sizes]
    known = {"cells": torch.randn(8, 6) if tiny else torch.randn(2048, 24)}
    return Made(model, known, lambda model, x: model(x["cells"]), tables)
