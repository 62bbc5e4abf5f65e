"""What a measured call reads: random tensors, what masks in the terms of torch and of fastattn, and parts of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks import Segments
from .case import Case

DTYPE = torch.bfloat16
MOST_BYTES = 8 << 30  #: of all input sets of a call
MOST_SETS = 512


class Inputs(NamedTuple):
    """What a call reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: Tensor  #: k's and v's, flat, one after the other
    mask: Tensor | None  #: what masks, as torch's attention takes it, where is_causal does not say it: bool or additive
    sinks: Tensor | None
    lengths: Tensor | None  #: int32 [B]
    grad_out: Tensor
    segments: Segments | None = None  #: padding and packing, as fastattn takes them
    starts: Tensor | None = None  #: int32 [N + 1], of packed sequences


def make_inputs(case: Case, device: torch.device, generator: torch.Generator, count: int) -> list[Inputs]:
    """`count` sets of standard normal inputs; mask, sinks and lengths are the same ones in all."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device, generator=generator)

    c = case
    mask = torch_mask(c, device, generator)
    segments, starts = None, None
    if c.padding is not None:
        padding = torch.tensor(c.padding, dtype=torch.int32, device=device)
        segments = Segments.left_padded(padding, c.q_len, c.kv_len)
    if c.packed is not None:
        ends = torch.tensor((0, *c.packed), device=device).cumsum(0)
        starts = ends.to(torch.int32)
        segments = Segments.packed(starts, causal=True)
    lengths = None if c.lengths is None else torch.tensor(c.lengths, dtype=torch.int32, device=device)
    sinks = normal(c.q_heads) if c.sinks else None
    found = []
    for _ in range(count):
        tensors = 1 if c.values else 2
        if c.head_major:
            both = normal(tensors, c.batch, c.kv_heads, c.kv_len, c.dim)
            k, v = both[0], both[-1]
        else:
            both = normal(tensors, c.batch, c.kv_len, c.kv_heads, c.dim)
            k, v = both[0].transpose(1, 2), both[-1].transpose(1, 2)
        v = v[..., : c.value_dim]
        q, grad_out = (normal(c.batch, c.q_len, c.q_heads, n).transpose(1, 2) for n in (c.dim, c.value_dim))
        found.append(Inputs(q, k, v, both.view(-1), mask, sinks, lengths, grad_out, segments, starts))
    return found


def torch_mask(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    """A mask for torch's attention, `[B|1, 1, Sq, Skv]`, or None where is_causal, or nothing, says the same."""
    c = case
    if c.lengths is not None:
        ends = torch.tensor(c.lengths, device=device)
        seen = (torch.arange(c.kv_len, device=device) < ends[:, None])[:, None, None].expand(-1, 1, c.q_len, -1)
        return seen.contiguous()  # some of torch's kernels misread others
    window, special = c.left >= 0, c.padding is not None or c.packed is not None or c.additive
    if c.q_len == 1 or not (special or window or c.q_len != c.kv_len):
        return None
    seen = torch.ones(c.q_len, c.kv_len, dtype=torch.bool, device=device).tril(c.kv_len - c.q_len)
    if window:
        seen = seen.triu(c.kv_len - c.q_len - c.left)
    seen = seen[None, None]
    if c.padding is not None:
        first = torch.tensor(c.padding, device=device)
        seen = seen & (torch.arange(c.kv_len, device=device) >= first[:, None])[:, None, None]
    if c.packed is not None:
        place = document_of(c, device)
        seen = seen & (place[:, None] == place)
    if not c.additive:
        return seen
    bias = torch.randn(seen.shape, dtype=DTYPE, device=device, generator=generator)
    return bias.masked_fill_(~seen, -torch.inf)


def document_of(case: Case, device: torch.device) -> Tensor:
    """Which of the packed sequences each token belongs to, `[S]`."""
    lengths = torch.tensor(case.packed, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)


def with_gradients(x: Inputs) -> Inputs:
    """The same, of which q, k and v require gradients."""
    return x._replace(**{name: getattr(x, name).detach().requires_grad_() for name in "qkv"})


def set_count(case: Case, l2_bytes: int) -> int:
    """How many input sets it takes so that what a call reads is not in the L2 cache when its turn comes again."""
    q_bytes = case.batch * case.q_heads * case.q_len * case.dim * DTYPE.itemsize
    whole = 2 * q_bytes + 2 * case.batch * case.kv_heads * case.kv_len * case.dim * DTYPE.itemsize
    wanted = math.ceil(4 * l2_bytes / (q_bytes + case.kv_bytes))
    return max(1, min(wanted, MOST_BYTES // whole, MOST_SETS))


def poisoned(case: Case, x: Inputs) -> Inputs:
    """The same with NaN in the keys and values past the lengths."""
    k, v = x.k.clone(), x.v.clone()
    for b, length in enumerate(case.lengths or ()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    return x._replace(k=k, v=v)


class Part(NamedTuple):
    """One batch entry and one K/V head of a call, with the query heads that share it: attention all of its own."""

    entry: int
    head: int

    def of(self, case: Case, x: Inputs) -> tuple[Case, Inputs]:
        """The part of a call, which is a call."""
        one = slice(self.entry, self.entry + 1)
        mask = x.mask if x.mask is None or x.mask.shape[0] == 1 else x.mask[one]
        lengths, padding = (None if n is None else (n[self.entry],) for n in (case.lengths, case.padding))
        segments = x.segments
        if segments is not None and padding is not None:
            segments = segments._replace(table=segments.table[:, one] * segments.table.new_tensor([[0], [1], [1]]))
        q, k, v, grad_out = self.cut(case, (x.q, x.k, x.v, x.grad_out))
        return replace(
            case, batch=1, q_heads=case.q_heads // case.kv_heads, kv_heads=1, lengths=lengths, padding=padding
        ), x._replace(
            q=q,
            k=k,
            v=v,
            grad_out=grad_out,
            mask=mask,
            segments=segments,
            sinks=None if x.sinks is None else x.sinks.view(case.kv_heads, -1)[self.head],
            lengths=None if x.lengths is None else x.lengths[one],
        )

    def cut(self, case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The part of tensors `[B, Hq or Hkv, S, D]`."""
        found = []
        for x in tensors:
            width = x.shape[1] // case.kv_heads
            found.append(x[self.entry : self.entry + 1, self.head * width : (self.head + 1) * width])
        return tuple(found)


def without_padding(case: Case, out: Tensor) -> Tensor:
    """An output with 0 where the query is padding: fastattn gives that, others give what they like."""
    if case.padding is None:
        return out
    first = torch.tensor(case.padding, device=out.device)
    padding = torch.arange(case.q_len, device=out.device) < first[:, None]
    return out.masked_fill(padding[:, None, :, None], 0)
