"""The backward: the same two kinds of plan as the forward, fed with its output and log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import masks, reference
from ...call import Call, Gradients, Problem, as_token_major, token_major
from ..layout import TokenMajor, aligned, copied, readable, realigned
from . import plans
from .geometry import (
    MIN_CAPACITY,
    SCALE,
    StaticKeys,
    band,
    capacity,
    heads_lie_apart,
    leaves_gaps,
    length_operands,
    lower_right,
    may_be_static,
    ragged_operand,
    ragged_rows,
    ragged_stats,
    static_key,
    stats_operand,
    total,
)
from .graphs import KEY_SIDE, PlanKey
from .operands import masked, needs_bias, scale_operand
from .plan import Plan
from .plans import PlanChoice
from .ragged_offsets import RaggedOffsets
from .support import deterministic_refusal, segments_fit

_MIN_CAPACITY = 1 << 10  #: tokens; the backward's workspace grows with what is declared (its time does not)
_GRADIENTS = (("dq", "q"), ("dk", "k"), ("dv", "v"))
_LAYOUTS = 32  #: of the forward's output and its gradient, of which each has a choice of plans


class Backward:
    """The backward of all calls of one problem and one layout of q, k and v."""

    __slots__ = ("_biased", "_bound", "_in_place", "_problem")

    def __init__(self, p: Problem) -> None:
        self._problem = p
        self._biased: StaticKeys | None = None  #: of the plans for calls with a bias
        #: by whether algorithms are deterministic, and all strides
        self._bound: dict[tuple[Any, ...], _Bound] = {}
        #: those of them for which nothing has to be copied, by the same and the strides of the output and its gradient
        self._in_place: dict[tuple[Any, ...], _Bound] = {}

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """See `Kernel.backward`. cuDNN takes no gradient of the log-sum-exp: the reference computes such calls."""
        p, c = self._problem, call
        deterministic = torch.are_deterministic_algorithms_enabled()
        if grad_lse is None:
            known = self._in_place.get((deterministic, out.stride(), grad_out.stride()))
            if known is not None and aligned(c.q, c.k, c.v, out, grad_out):
                found = known.run(c, c.q, c.k, c.v, out, grad_out, _stats(p, lse))
                return self._gradients(p, c, found, out, lse, grad_out)
        if not segments_fit(p):
            p, c = masks.as_intervals(p, c)
        biased = needs_bias(p)
        if grad_lse is not None or (deterministic and deterministic_refusal(p, "m" in p.grads, ragged=not biased)):
            return reference.backward(p, c, grad_out, grad_lse)
        if biased:
            tensors = self._with_bias(p, c, out, _stats(p, lse), grad_out, deterministic)
        else:
            tensors = self._without_bias(p, c, out, _stats(p, lse), grad_out, deterministic)
        return self._gradients(p, c, tensors, out, lse, grad_out)

    def _gradients(
        self, p: Problem, c: Call, tensors: dict[str, Tensor], out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> Gradients:
        """What the caller wants of all that was computed."""
        dmask = dsinks = None
        if "m" in p.grads and c.mask is not None:
            dmask = _mask_gradient(p, c, tensors, out, lse, grad_out).to(c.mask.dtype)
        if "s" in p.grads and c.sinks is not None:
            from .sinks import sink_gradient  # and with it Triton

            dsinks = sink_gradient(out, grad_out, lse, c.sinks)
        dq, dk, dv = [tensors[d] if role in p.grads else None for d, role in _GRADIENTS]
        return Gradients(dq, dk, dv, dmask, dsinks)

    def _without_bias(
        self, p: Problem, c: Call, out: Tensor, stats: Tensor, grad_out: Tensor, deterministic: bool
    ) -> dict[str, Tensor]:
        # Heads of a group share their K/V gradient, so they stay together and their stride is baked into the plan.
        q, o, do = (_grouped(p, readable(x)) for x in (c.q, out, grad_out))
        k, v = readable(c.k), readable(c.v)
        if total(p):  # cuDNN (9.19) looks for what it accumulates at q's and k's offsets, not at those of dq and dk
            q, k, v = as_token_major(q, p.dtype), as_token_major(k, p.dtype), as_token_major(v, p.dtype)
        key = deterministic, q.stride(), k.stride(), v.stride(), o.stride(), do.stride()
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= _LAYOUTS:
                self._bound.clear()
                self._in_place.clear()
            bound = self._bound[key] = _Bound(p, q, k, v, o, do, deterministic)
        if p is self._problem and q is c.q and k is c.k and v is c.v and o is out and do is grad_out:
            self._in_place[deterministic, out.stride(), grad_out.stride()] = bound
        return bound.run(c, q, k, v, o, do, stats)

    def _with_bias(
        self, p: Problem, c: Call, out: Tensor, stats: Tensor, grad_out: Tensor, deterministic: bool
    ) -> dict[str, Tensor]:
        added, q, k, v, fully_masked = masked(p, c, whole=True)
        q, k, v, o, do = [readable(x) for x in (q, k, v, out, masks.clear(grad_out, fully_masked))]
        tensors = {"q": q, "k": k, "v": v, "o": o, "do": do, **_gradients(q, k, v), "bias": added}
        if "m" in p.grads and p.mask_shape[3] > 1:
            tensors["dbias"] = q.new_empty(added.shape)  # float32 is not offered
        if self._biased is None:
            self._biased = StaticKeys(p, direction="backward")
        plan = plans.shared.get(self._biased.of(tensors, deterministic))
        return _execute_static(c, plan, tensors, stats)


class _Bound:
    """What depends on the layout of all tensors: the choice of a plan, the offsets, and how the gradients are made."""

    __slots__ = ("_choice", "_gaps", "_make", "_offsets", "_problem", "_ragged_stats", "_stats_strides")

    def __init__(self, p: Problem, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, deterministic: bool) -> None:
        self._problem = p
        self._make = [(d, TokenMajor(x.shape, x)) for (d, _), x in zip(_GRADIENTS, (q, k, v), strict=True)]
        tensors = {"q": q, "k": k, "v": v, "o": o, "do": do, **_gradients(q, k, v)}
        static = None
        if may_be_static(p):
            static = static_key(p, tensors, direction="backward", deterministic=deterministic)
        q_max, kv_max = (capacity(n, MIN_CAPACITY if total(p) else _MIN_CAPACITY) for n in (p.q_len, p.kv_len))
        dynamic = _dynamic_key(p, tensors, deterministic, q_max, kv_max)
        larger = partial(_larger_keys, p, _shapes(tensors), deterministic, q_max, kv_max)
        self._choice = PlanChoice(plans.shared, static, dynamic, larger, trained=True)
        self._offsets = RaggedOffsets(p, ragged_rows(p, p.kv_heads), p.kv_heads)
        self._gaps = leaves_gaps(p)
        self._ragged_stats = ragged_stats(p)
        self._stats_strides = p.q_heads * p.q_len, 1, p.q_heads  #: of a dynamic plan's, where they lie token-major

    def run(self, c: Call, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, stats: Tensor) -> dict[str, Tensor]:
        """All tensors by their roles, gradients among them. stats: see `_stats`. The others: as those of `__init__`."""
        p = self._problem
        tensors = {"q": q, "k": k, "v": v, "o": o, "do": do}
        for d, make in self._make:
            tensors[d] = make()
        plan, is_static = self._choice.plan()
        if is_static:
            return _execute_static(c, plan, tensors, stats)
        if self._gaps:
            for d, _ in _GRADIENTS:
                tensors[d].zero_()
        if self._ragged_stats:
            if stats.stride() != self._stats_strides:
                stats = stats.transpose(1, 2).contiguous().transpose(1, 2)
            tensors["stats"] = realigned(stats)
            tensors |= self._offsets(tensors, c)
        else:
            tensors |= self._offsets(tensors, c)
            operand = plan.key.operand("stats")
            assert operand is not None
            spread = tensors["stats"] = stats.new_empty(operand.dims)
            spread.view(-1, p.q_heads, operand.dims[2])[: p.batch, :, : p.q_len] = stats
        tensors["scale"] = scale_operand(c.scale)
        plan.execute(tensors)
        return tensors


def _stats(p: Problem, lse: Tensor) -> Tensor:
    """The log-sum-exp as a backward takes it: exp(score - inf) = 0, so that a fully masked row does not become
    exp(-inf + inf) = NaN."""
    if not p.may_have_empty_rows:
        return lse
    return lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def _dynamic_key(p: Problem, tensors: dict[str, Tensor], deterministic: bool, q_max: int, kv_max: int) -> PlanKey:
    """The plan for any length up to q_max queries and kv_max keys."""
    left, right = band(p)
    rows = ragged_rows(p, p.kv_heads)
    lengths = {role: kv_max if role in KEY_SIDE else q_max for role in tensors}
    operands = [ragged_operand(role, x, rows, p.kv_heads, lengths[role]) for role, x in tensors.items()]
    roles = [*tensors, "stats"] if ragged_stats(p) else list(tensors)
    operands += [SCALE, *length_operands(rows, roles), stats_operand(p, rows, p.kv_heads, q_max)]
    return PlanKey("backward", p.index, tuple(operands), left, right, lower_right(p), deterministic, total(p))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without memory, to be kept."""
    return {role: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for role, x in tensors.items()}


def _larger_keys(
    p: Problem, tensors: dict[str, Tensor], deterministic: bool, q_max: int, kv_max: int
) -> Iterator[PlanKey]:
    """Plans for longer calls that could serve this one: all that they cost is workspace."""
    while max(q_max, kv_max) < MIN_CAPACITY:
        q_max, kv_max = min(2 * q_max, MIN_CAPACITY), min(2 * kv_max, MIN_CAPACITY)
        yield _dynamic_key(p, tensors, deterministic, q_max, kv_max)


def _execute_static(c: Call, plan: Plan, tensors: dict[str, Tensor], stats: Tensor) -> dict[str, Tensor]:
    tensors["stats"] = realigned(stats.contiguous())
    tensors["scale"] = scale_operand(c.scale)
    plan.execute(tensors)
    return tensors


def _mask_gradient(p: Problem, c: Call, tensors: dict[str, Tensor], out: Tensor, lse: Tensor, do: Tensor) -> Tensor:
    """The gradient of an additive mask, reduced over the dims along which it was broadcast."""
    if "dbias" in tensors:
        return masks.reduce_to(tensors["dbias"].float(), p.mask_shape)
    # One number for all keys of a row moves nothing but the sink's share: sum_j ds_j = -ds_sink, 0 without sinks.
    # Summing cuDNN's rounded ds would leave the rounding.
    if c.sinks is None:
        return out.new_zeros(p.mask_shape, dtype=torch.float32)
    delta = torch.where(out == 0, 0, do.float() * out.float()).sum(-1)
    rows = torch.exp(c.sinks.float()[:, None] - lse) * delta
    return masks.reduce_to(rows[..., None], p.mask_shape)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {d: token_major(x, *x.shape) for (d, _), x in zip(_GRADIENTS, (q, k, v), strict=True)}


def _grouped(p: Problem, x: Tensor) -> Tensor:
    return copied(x) if p.group > 1 and heads_lie_apart(x) else x
