"""The forward: which plan serves a call, and what goes into it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import masks
from ...call import Call, Problem, token_major
from ...shape_cache import Memo
from ..base import Runner
from ..layout import ALIGNMENT, Output, fits, readable
from .graphs import Operand, PlanKey
from .operands import exact, keeps_band, masked, needs_bias, packed, scale_operand
from .plan_cache import Choice, cache
from .ragged_offsets import Places
from .support import GENERIC, is_packed, segments_fit, sums_lengths

SCALE = Operand("scale", (1, 1, 1, 1), (1, 1, 1, 1), torch.float32)
MIN_SEGMENTS = 16  #: packed sequences that a plan has room for, at the least; a place left empty costs 1 to 4 us
MIN_TOTAL = 1 << 10  #: tokens of all of them that its backward has room for, at the least
MIN_CAPACITY = 1 << 14  #: length that an any-length plan is declared for, at the least; a larger one costs no time


def bind(p: Problem, c: Call) -> Runner:
    """See `Backend.bind`."""
    if not segments_fit(p):
        run = bind(*masks.as_intervals(p, c))
        return lambda c: run(masks.as_intervals(p, c)[1])
    return partial(_with_bias, p) if needs_bias(p) else _without_bias(p, *c[:3])


def total(p: Problem) -> int:
    """Tokens that the workspace of a backward for packed sequences is made for; 0 where cuDNN can make it only for all
    rows at full length.

    Its accumulators lie as dq, dk and dv do, so what counts is where the last head of the last token ends: one more.
    """
    if not (is_packed(p) and sums_lengths(p)):
        return 0
    return capacity(p.batch * max(p.q_len, p.kv_len), MIN_TOTAL) + 1


def may_be_exact(p: Problem) -> bool:
    """True when a call without a bias can have a plan for just its shape."""
    return not leaves_gaps(p) and not (p.banded and p.q_len > p.kv_len)


def band(p: Problem) -> tuple[int, int]:
    """(left, right) as the graph needs them: the right bound says nothing to a single query, and costs a kernel."""
    return (p.left, -1) if p.q_len == 1 else (p.left, p.right)


def lower_right(p: Problem) -> bool:
    """False when upper-left says the same: it is 1.4 to 1.6 times faster in the backward."""
    if p.mask == "segments":
        return p.mask_shape[0] == 5
    return p.q_len != p.kv_len or p.q_lengths or p.kv_lengths


def capacity(length: int, least: int = MIN_CAPACITY) -> int:
    """The length that the any-length plan for a call is declared for."""
    return max(least, 1 << (length - 1).bit_length())


def ragged_operand(role: str, x: Tensor, rows: int, fold: int, length: int) -> Operand:
    """A tensor `[B,H,S,D]` as an any-length plan knows it: its heads folded into `rows` ragged entries.

    With `H == fold` the token stride is all that is left of its layout; else the stride between the heads of a group.
    """
    heads, dim = x.shape[1] // fold if x.shape[1] > fold else 1, x.shape[3]
    token = x.stride(2) if x.shape[2] > 1 else x.shape[1] * dim
    # One head has no stride, but cuDNN lays a group's unreduced K/V gradients out by it.
    head = x.stride(1) if heads > 1 else dim
    return Operand(role, (rows, heads, length, dim), (heads * length * dim, head, token, 1), x.dtype)


def heads_lie_apart(x: Tensor) -> bool:
    """True when the stride between heads grows with the length (head-major), so that it cannot be baked into a plan."""
    return x.shape[2] > 1 and x.stride(1) > x.stride(2)


def ragged_rows(p: Problem, fold: int) -> int:
    """Ragged entries of a plan: batch sizes share plans by powers of two, the surplus has length 0."""
    count = max(p.mask_shape[1], MIN_SEGMENTS) if is_packed(p) else p.batch
    return (1 << (count - 1).bit_length()) * fold


def leaves_gaps(p: Problem) -> bool:
    """True when an any-length plan may leave some queries and keys untouched: their lengths are data."""
    return p.q_lengths or p.kv_lengths or p.mask in ("intervals", "segments")


def ragged_stats(p: Problem) -> bool:
    """True when the log-sum-exp of an any-length plan can lie token-major, at offsets of its own."""
    return p.capability not in GENERIC or not p.grads


def stats_operand(p: Problem, rows: int, fold: int, length: int) -> Operand:
    """The log-sum-exp of an any-length plan."""
    dims = (rows, p.q_heads // fold, length, 1)
    if not ragged_stats(p):
        return packed("stats", dims, torch.float32)
    return Operand("stats", dims, (p.q_heads * length, 1, p.q_heads, 1), torch.float32)


def exact_key(
    p: Problem,
    tensors: dict[str, Tensor],
    stats: bool = True,
    biased: bool = False,
    direction: str = "forward",
    deterministic: bool = False,
) -> PlanKey:
    """The plan for just these tensors. biased: the bias says what the band does not say of itself."""
    operands = [exact(role, x) for role, x in tensors.items()] + [SCALE]
    if stats:
        operands.append(packed("stats", (p.batch, p.q_heads, p.q_len, 1), torch.float32))
    left, right = band(p) if not biased or keeps_band(p) else (-1, -1)
    lower = not biased and lower_right(p)
    return PlanKey(direction, p.index, tuple(operands), left, right, lower, deterministic)


def length_operands(rows: int, roles: Iterable[str]) -> list[Operand]:
    one = (1, 1, 1, 1)
    offsets = [Operand(f"ragged_{role}", (rows + 1, 1, 1, 1), one, torch.int64) for role in roles]
    return [*offsets, *(Operand(role, (rows, 1, 1, 1), one, torch.int32) for role in ("seq_q", "seq_kv"))]


class _WithoutBias:
    """The forward of calls that need no bias, all of one problem and one set of strides: what can be is made once."""

    __slots__ = ("_choice", "_gaps", "_in_place", "_lse", "_output", "_places", "_problem", "_ragged_stats", "_stats")

    def __init__(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._problem = p
        self._in_place = fits(q) and fits(k) and fits(v)
        fold = p.q_heads if heads_lie_apart(q) else p.kv_heads
        rows, q_max, kv_max = ragged_rows(p, fold), capacity(p.q_len), capacity(p.kv_len)
        self._places = Places(p, rows, fold)
        self._ragged_stats = ragged_stats(p)
        out = token_major(q.new_empty(0, device="meta"), p.batch, p.q_heads, p.q_len, p.value_dim)
        self._output = Output(p, q)
        self._gaps = leaves_gaps(p)
        operands = [
            ragged_operand("q", q, rows, fold, q_max),
            ragged_operand("k", k, rows, p.kv_heads, kv_max),
            ragged_operand("v", v, rows, p.kv_heads, kv_max),
            ragged_operand("o", out, rows, fold, q_max),
            SCALE,
        ]
        roles = ["q", "k", "v", "o"]
        self._lse = stats = _needs_stats(p)
        self._stats: tuple[int, ...] = ()  #: of the plan for any length, where they do not lie token-major
        if stats:
            operands.append(stats_operand(p, rows, fold, q_max))
            if self._ragged_stats:
                roles.append("stats")
            else:
                self._stats = operands[-1].dims
        operands += length_operands(rows, roles)
        left, right = band(p)
        general = PlanKey("forward", p.index, tuple(operands), left, right, lower_right(p))
        only = exact_key(p, {"q": q, "k": k, "v": v, "o": out}, stats) if may_be_exact(p) else None
        self._choice = Choice(only, general, trained=bool(p.grads))

    def __call__(self, c: Call) -> tuple[Tensor, Tensor | None]:
        p, q, k, v = self._problem, c.q, c.k, c.v
        if not self._in_place or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
            q, k, v = readable(q), readable(k), readable(v)
            return _without_bias(p, q, k, v)._run(c._replace(q=q, k=k, v=v))
        return self._run(c)

    def _run(self, c: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, c.q
        plan, is_exact = self._choice.plan()
        out = self._output(q)
        tensors = {"q": q, "k": c.k, "v": c.v, "o": out, "scale": scale_operand(c.scale)}
        lse = None
        if is_exact:
            if self._lse:
                lse = _exact_stats(p, tensors)
        else:
            if self._lse and self._ragged_stats:
                lse = tensors["stats"] = token_major_lse(p, q)
            if self._gaps:
                out.zero_()
                if lse is not None:
                    lse.fill_(-torch.inf)
            tensors |= self._places(tensors, c)
            if self._stats:
                found = tensors["stats"] = q.new_full(self._stats, -torch.inf, dtype=torch.float32)
                lse = found.view(-1, p.q_heads, self._stats[2])[: p.batch, :, : p.q_len]
        plan.run(tensors)
        return _finished(c, out, lse)


_bound: Memo[Any, _WithoutBias] = Memo(1 << 13, "cuDNN calls")


def _without_bias(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> _WithoutBias:
    name = (p, q.stride(), k.stride(), v.stride())
    found = _bound.get(name)
    if found is None:
        found = _bound[name] = _WithoutBias(p, q, k, v)
    return found


def _with_bias(p: Problem, c: Call) -> tuple[Tensor, Tensor | None]:
    added, *qkv, _ = masked(p, c, whole=False)
    q, k, v = (readable(x) for x in qkv)
    out = token_major(q, p.batch, p.q_heads, p.q_len, p.value_dim)
    tensors = {"q": q, "k": k, "v": v, "o": out, "bias": added}
    stats = _needs_stats(p)
    plan = cache.get(exact_key(p, tensors, stats, biased=True))
    tensors["scale"] = scale_operand(c.scale)
    lse = _exact_stats(p, tensors) if stats else None
    plan.run(tensors)
    return _finished(c, out, lse)


def _needs_stats(p: Problem) -> bool:
    return p.return_lse or bool(p.grads) or p.sinks


def _exact_stats(p: Problem, tensors: dict[str, Tensor]) -> Tensor:
    """Gives an exact plan room for its log-sum-exp `[B,Hq,Sq]`."""
    found = tensors["stats"] = tensors["q"].new_empty((p.batch, p.q_heads, p.q_len, 1), dtype=torch.float32)
    return found[..., 0]


def token_major_lse(p: Problem, like: Tensor) -> Tensor:
    """Room for a log-sum-exp `[B,H,S]` whose memory runs `[B,S,H]`: then any length can have the same plan."""
    return like.new_empty((p.batch, p.q_len, p.q_heads), dtype=torch.float32).transpose(1, 2)


def _finished(c: Call, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if c.sinks is not None and lse is not None:
        from .sinks import add_sinks  # and with it Triton

        return out, add_sinks(out, lse, c.sinks)
    return out, lse
