"""Blocks of attention and the sum of them: log-sum-exp merging forward, and each block's share backward.

With out and lse of the whole row, a block's share of the gradients needs nothing of the other blocks:

    p = exp(s - lse),    ds = p * (do v^T - delta),    delta = rowsum(do * out) - dlse

which is what a flash backward computes from the out and lse that it is given. A backend that computes its softmax again
instead is given the block's own output o and log-sum-exp l and its weight w = exp(l - lse) in the row:

    do' = w * do,    dl = w * (rowsum(do * o) - delta)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..api import scaled_dot_product_attention
from ..call import as_token_major, token_major, work_dtype
from ..dispatch.registry import use_backend
from ..dispatch.serve import backward_by_lse
from ..validation import Arguments, validated
from .layout import Span
from .merge import merge_
from .plan import Block


@dataclass(frozen=True)
class Options:
    """What all blocks of a call share."""

    scale: float
    softcap: float | None
    names: tuple[str, ...]  #: backends allowed in the forward; autograd's threads do not know


class Whole(NamedTuple):
    """Of whole rows: the output, the log-sum-exp, and their gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def rows(self, span: Span) -> Whole:
        out, lse, grad_out = (x[:, :, span.start : span.stop] for x in self[:3])
        return Whole(out, lse, grad_out, None if self.grad_lse is None else self.grad_lse[:, :, span.start : span.stop])

    def delta(self) -> Tensor:
        """rowsum(do * out) - dlse, in lse's dtype."""
        found = (self.grad_out.to(self.lse.dtype) * self.out).sum(-1)
        return found if self.grad_lse is None else found - self.grad_lse


class Rows:
    """Output and log-sum-exp of a rank's queries, while blocks come in."""

    def __init__(self, q: Tensor, value_dim: int, once: bool) -> None:
        """once: no row is in two blocks, so that nothing needs to be kept in more than q's precision."""
        self.q, self.value_dim = q, value_dim
        self.dtype = q.dtype if once else work_dtype(q.dtype)
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.done: list[Span] = []

    def add(self, rows: Span, out: Tensor, lse: Tensor) -> None:
        if self.out is None and rows.size == self.q.shape[2]:
            self.out = out if out.dtype == self.dtype else out.to(self.dtype)
            self.lse = lse.contiguous()
        else:
            whole, whole_lse = self._room()
            part, part_lse = whole[:, :, rows.start : rows.stop], whole_lse[:, :, rows.start : rows.stop]
            if all(rows.stop <= other.start or other.stop <= rows.start for other in self.done):
                part.copy_(out)
                part_lse.copy_(lse)
            else:
                merge_(part, part_lse, out, lse)
        self.done.append(rows)

    def finish(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output in q's dtype, token-major, and the log-sum-exp; sinks are counted here, once."""
        out, lse = self._room()
        if sinks is not None:
            sink = sinks.to(lse.dtype)[:, None]
            out = out * torch.sigmoid(lse - sink)[..., None]
            lse = torch.logaddexp(lse, sink)
        return as_token_major(out, self.q.dtype), lse

    def _room(self) -> tuple[Tensor, Tensor]:
        if self.out is None or self.lse is None:
            q = self.q
            self.out = token_major(q, q.shape[0], q.shape[1], q.shape[2], self.value_dim, self.dtype).zero_()
            self.lse = q.new_full(q.shape[:3], -torch.inf, dtype=work_dtype(q.dtype))
        return self.out, self.lse


def forward(rows: Rows, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], options: Options) -> None:
    """Adds blocks of the queries q and the keys at hand."""
    for block in blocks:
        found = _attend(*_cut(q, k, v, block), block, options)
        rows.add(block.rows, *found)


def backward(
    into: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Whole,
    blocks: Sequence[Block],
    options: Options,
) -> None:
    """Adds the blocks' shares of the gradients to dq, dk, dv, which are as long as q, k, v."""
    dq, dk, dv = into
    for block in blocks:
        shares = _shares(*_cut(q, k, v, block), whole.rows(block.rows), block, options)
        dq[:, :, block.rows.start : block.rows.stop] += shares[0]
        dk[:, :, block.keys.start : block.keys.stop] += shares[1]
        dv[:, :, block.keys.start : block.keys.stop] += shares[2]


def sink_gradient(whole: Whole, sinks: Tensor) -> Tensor:
    """`[Hq]`, of these rows alone."""
    weight = torch.exp(sinks.to(whole.lse.dtype)[:, None] - whole.lse)
    return -(weight * whole.delta()).sum((0, 2)).to(sinks.dtype)


def _cut(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    a, b = block.keys
    return q[:, :, block.rows.start : block.rows.stop], k[:, :, a:b], v[:, :, a:b]


def _attend(q: Tensor, k: Tensor, v: Tensor, block: Block, options: Options) -> tuple[Tensor, Tensor]:
    with use_backend(*options.names):
        found = scaled_dot_product_attention(
            q,
            k,
            v,
            scale=options.scale,
            mask=block.mask,
            window=block.window,
            softcap=options.softcap,
            return_lse=True,
        )
    assert isinstance(found, tuple)
    return found


def _shares(q: Tensor, k: Tensor, v: Tensor, whole: Whole, block: Block, options: Options) -> tuple[Tensor, ...]:
    """dq, dk and dv of one block."""
    if whole.grad_lse is None and not torch.are_deterministic_algorithms_enabled():
        found = _shares_by_lse(q, k, v, whole, block, options)
        if found is not None:
            return found
    with torch.enable_grad():
        q, k, v = inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out, lse = _attend(q, k, v, block, options)
    weight = torch.exp(lse.detach() - whole.lse).nan_to_num_(0.0)  # a row that sees nothing anywhere: -inf - -inf
    grad_out = whole.grad_out.to(lse.dtype)
    grad_lse = weight * ((grad_out * out.detach()).sum(-1) - whole.delta())
    return torch.autograd.grad((out, lse), inputs, ((weight[..., None] * grad_out).to(out.dtype), grad_lse))


def _shares_by_lse(
    q: Tensor, k: Tensor, v: Tensor, whole: Whole, block: Block, options: Options
) -> tuple[Tensor, ...] | None:
    """The same from a backward that reads the rows' log-sum-exp; None where there is none for this call."""
    arguments = Arguments(q, k, v, block.mask, window=block.window, softcap=options.softcap)
    call = validated(arguments, options.scale)._replace(grads="qkv")
    found = backward_by_lse(call, options.names, whole.out, whole.lse, whole.grad_out)
    if found is None:
        return None
    assert found.q is not None and found.k is not None and found.v is not None
    return found.q, found.k, found.v
