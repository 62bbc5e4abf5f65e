"""The three strategies of attention over ranks. All take and return local shards, `[B, H, tokens, D]`.

allgather every rank gets all keys and values; the backward reduces and scatters their gradients
ring      keys and values go from rank to rank, the next ones on their way while the current ones are computed with
ulysses   an all-to-all exchanges tokens for heads, and back; between them, an ordinary call over the whole sequence
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import as_token_major, dtypes_of, in_dtypes, token_major, work_dtype
from . import blocks, exchange
from .blocks import Options, Rows, Whole
from .exchange import Group
from .layout import Layout, Span
from .plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def by_allgather(
    plan: Plan, group: Group, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    return _Gather.apply(plan, group, options, q, k, v, sinks)


def by_ring(
    plan: Plan, group: Group, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    return _Ring.apply(plan, group, options, q, k, v, sinks)


def by_heads(
    layout: Layout, rank: int, group: Group, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    """attend: the op, of the whole sequence and this rank's heads; its log-sum-exp if it is wanted, else None."""
    heads = Heads(layout, rank, q.shape[1], k.shape[1])
    q, k, v = _ToHeads.apply(heads, group, q, k, v)
    mine = None if sinks is None else sinks[slice(*heads.q[rank])]
    out, lse = attend(q, k, v, mine)
    out = _ToTokens.apply(heads, group, out)
    return out, None if lse is None else _ToTokens.apply(heads, group, lse[..., None])[..., 0]


def _whole(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Whole:
    *_, out, lse = _saved(ctx)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return Whole(out, lse, grad_out, grad_lse)


def _zeros(x: Tensor) -> Tensor:
    """Room for a gradient, in the precision of sums."""
    batch, heads, tokens, dim = x.shape
    return token_major(x, batch, heads, tokens, dim, work_dtype(x.dtype)).zero_()


def _results(ctx: Any, whole: Whole, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    q, k, v, sinks, *_ = _saved(ctx)
    found = [as_token_major(x, like.dtype) for x, like in ((dq, q), (dk, k), (dv, v))]
    dsinks = blocks.sink_gradient(whole, sinks) if sinks is not None and ctx.needs_input_grad[6] else None
    return None, None, None, *found, dsinks


class _Gather(torch.autograd.Function):
    """Local shards in, local shards out. Saves local shards only: the backward gathers again."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, group: Group, options: Options, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = Rows(q, v.shape[3], once=_apart(plan))
        keys, values = exchange.gather(plan.layout, (k, v), plan.rank, group)
        blocks.forward(rows, q, keys, values, plan.whole, options)
        out, lse = rows.finish(sinks)
        _save(ctx, plan, group, options, q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *_ = _saved(ctx)
        plan, group, whole = ctx.plan, ctx.group, _whole(ctx, *grads)
        keys, values = exchange.gather(plan.layout, (k, v), plan.rank, group)
        dq, dk, dv = _zeros(q), _zeros(keys), _zeros(values)
        blocks.backward((dq, dk, dv), q, keys, values, whole, plan.whole_backward, ctx.options)
        del keys, values
        dk, dv = exchange.reduce_scatter(plan.layout, (dk, dv), plan.rank, group)
        return _results(ctx, whole, dq, dk, dv)


class _Ring(torch.autograd.Function):
    """Local shards in, local shards out. Saves local shards only: in the backward keys travel again, gradients back."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, group: Group, options: Options, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = Rows(q, v.shape[3], once=plan.layout.ranks == 1)
        for step, keys, values in exchange.visit(plan, k, v, group):
            blocks.forward(rows, q, keys, values, step.blocks, options)
        out, lse = rows.finish(sinks)
        _save(ctx, plan, group, options, q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *_ = _saved(ctx)
        plan, whole = ctx.plan, _whole(ctx, *grads)
        dq, dk, dv = _zeros(q), _zeros(k), _zeros(v)
        returns = exchange.Returns(dk, dv, k, ctx.group)
        for i, (step, keys, values) in enumerate(exchange.visit(plan, k, v, ctx.group)):
            shares = _zeros(keys), _zeros(values)
            blocks.backward((dq, *shares), q, keys, values, whole, step.blocks, ctx.options)
            (returns.send if i else returns.keep)(step, *shares)
        returns.finish()
        return _results(ctx, whole, dq, dk, dv)


def _save(ctx: Any, plan: Plan, group: Group, options: Options, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.dtypes = dtypes_of(tensors)
    ctx.plan, ctx.group, ctx.options = plan, group, options
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> list[Any]:
    return in_dtypes(ctx.saved_tensors, ctx.dtypes)


def _apart(plan: Plan) -> bool:
    """True when no row is in two blocks."""
    spans = sorted(block.rows for block in plan.whole)
    return all(a.stop <= b.start for a, b in pairwise(spans))


class Heads:
    """Which heads each rank gets. A K/V head goes to every rank that has one of its query heads."""

    def __init__(self, layout: Layout, rank: int, q_heads: int, kv_heads: int) -> None:
        why = refusal(layout.ranks, q_heads, kv_heads)
        if why:
            raise ValueError(f"strategy: {why}")
        ranks, each = layout.ranks, q_heads // layout.ranks
        group = q_heads // kv_heads
        self.layout, self.rank = layout, rank
        self.q = [Span(r * each, (r + 1) * each) for r in range(ranks)]
        self.kv = [Span(a // group, (b - 1) // group + 1) for a, b in self.q]


def refusal(ranks: int, q_heads: int, kv_heads: int) -> str:
    """Why heads cannot be spread over so many ranks; "" when they can."""
    if q_heads % ranks:
        return f'"ulysses" needs a number of query heads that {ranks} ranks divide, got {q_heads}'
    if kv_heads % ranks and ranks % kv_heads:
        return f'"ulysses" needs a number of K/V heads that divides {ranks} ranks or is divided by them, got {kv_heads}'
    return ""


def _spread(heads: Heads, group: Group, *tensors: Tensor, spans: list[list[Span]]) -> tuple[Tensor, ...]:
    """`[B, heads of all, own tokens, D]` to `[B, own heads, all tokens, D]`. One dtype."""
    layout, ranks = heads.layout, range(heads.layout.ranks)
    each = list(zip(tensors, spans))
    parts = [[x[:, slice(*s[r])].transpose(1, 2) for x, s in each] for r in ranks]
    shapes = [[(x.shape[0], layout.size(r), s[heads.rank].size, x.shape[3]) for x, s in each] for r in ranks]
    received = exchange.all_to_all(parts, shapes, group)
    return tuple(layout.join([row[i] for row in received], 1).transpose(1, 2) for i in range(len(tensors)))


def _collect(heads: Heads, group: Group, *tensors: Tensor, spans: list[list[Span]]) -> tuple[Tensor, ...]:
    """The inverse of `_spread`. Heads that several ranks have are summed."""
    layout, ranks = heads.layout, range(heads.layout.ranks)
    # Chunk by chunk, so that tokens are copied once.
    parts = [[x[:, :, a:b].transpose(1, 2) for x in tensors for a, b in layout.held(r)] for r in ranks]
    pieces = [piece.size for piece in layout.pieces(heads.rank)]
    shapes = [[(x.shape[0], n, s[r].size, x.shape[3]) for x, s in zip(tensors, spans) for n in pieces] for r in ranks]
    received = exchange.all_to_all(parts, shapes, group)
    found = []
    for i, s in enumerate(spans):
        own = slice(i * len(pieces), (i + 1) * len(pieces))
        found.append(_assembled([torch.cat(row[own], 1) for row in received], s))
    return tuple(found)


def _assembled(parts: list[Tensor], spans: list[Span]) -> Tensor:
    """`[B, tokens, heads, D]` of each rank's heads as `[B, heads of all, tokens, D]`."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return torch.cat(parts, 2).transpose(1, 2)
    batch, tokens, _, dim = parts[0].shape
    whole = parts[0].new_zeros((batch, tokens, spans[-1].stop, dim), dtype=work_dtype(parts[0].dtype))
    for part, span in zip(parts, spans):
        whole[:, :, slice(*span)] += part
    return whole.to(parts[0].dtype).transpose(1, 2)


class _ToHeads(torch.autograd.Function):
    """q, k and v of all heads and own tokens to those of own heads and all tokens."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.heads, ctx.group = heads, group
        return _spread(heads, group, *tensors, spans=[heads.q, heads.kv, heads.kv])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_collect(ctx.heads, ctx.group, *grads, spans=[ctx.heads.q, ctx.heads.kv, ctx.heads.kv])


class _ToTokens(torch.autograd.Function):
    """A result of own heads and all tokens to that of all heads and own tokens."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, group: Group, x: Tensor) -> Tensor:
        ctx.heads, ctx.group = heads, group
        return _collect(heads, group, x, spans=[heads.q])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, _spread(ctx.heads, ctx.group, grads[0], spans=[ctx.heads.q])[0]
