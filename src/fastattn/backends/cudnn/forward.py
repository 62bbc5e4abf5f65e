"""The forward: which plan serves a call, and what goes into it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ... import masks
from ...call import Call, Problem, token_major
from ..layout import ALIGNMENT, Output, fits, readable
from . import plans
from .geometry import (
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
)
from .graphs import PlanKey
from .operands import masked, needs_bias, scale_operand
from .plans import PlanChoice
from .ragged_offsets import RaggedOffsets
from .support import segments_fit

_LAYOUTS = 8  #: of q, k and v, as they are or copied


class Forward(Protocol):
    """The forward of all calls of one kind."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """See `Kernel.forward`."""
        ...


def bind_forward(p: Problem, c: Call) -> Forward:
    """The forward for calls of the kind of c."""
    if not segments_fit(p):
        return _SegmentsAsIntervals(p, c)
    return BiasForward(p) if needs_bias(p) else UnbiasedForward(p, c.q, c.k, c.v)


class _SegmentsAsIntervals:
    __slots__ = ("_forward", "_problem")

    def __init__(self, p: Problem, c: Call) -> None:
        self._problem = p
        self._forward = bind_forward(*masks.as_intervals(p, c))

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._forward.forward(masks.as_intervals(self._problem, call)[1])


class UnbiasedForward:
    """Calls that need no bias: a dynamic plan, or a static one once it is there."""

    __slots__ = (
        "_choice", "_gaps", "_in_place", "_lse", "_offsets", "_others", "_output", "_problem", "_ragged_stats", "_stats"
    )  # fmt: skip

    def __init__(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._problem = p
        self._in_place = fits(q) and fits(k) and fits(v)
        #: the same for calls of which some tensors have to be copied, by the strides of what is read then
        self._others: dict[tuple[tuple[int, ...], ...], UnbiasedForward] = {}
        fold = p.q_heads if heads_lie_apart(q) else p.kv_heads
        rows, q_max, kv_max = ragged_rows(p, fold), capacity(p.q_len), capacity(p.kv_len)
        self._offsets = RaggedOffsets(p, rows, fold)
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
        self._stats: tuple[int, ...] = ()  #: of the dynamic plan, where they do not lie token-major
        if stats:
            operands.append(stats_operand(p, rows, fold, q_max))
            if self._ragged_stats:
                roles.append("stats")
            else:
                self._stats = operands[-1].dims
        operands += length_operands(rows, roles)
        left, right = band(p)
        dynamic = PlanKey("forward", p.index, tuple(operands), left, right, lower_right(p))
        static = static_key(p, {"q": q, "k": k, "v": v, "o": out}, stats) if may_be_static(p) else None
        self._choice = PlanChoice(plans.shared, static, dynamic, trained=bool(p.grads))

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        q, k, v = call.q, call.k, call.v
        if not self._in_place or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
            q, k, v = readable(q), readable(k), readable(v)
            return self._for(q, k, v)._attend(call._replace(q=q, k=k, v=v))
        return self._attend(call)

    def _for(self, q: Tensor, k: Tensor, v: Tensor) -> UnbiasedForward:
        strides = q.stride(), k.stride(), v.stride()
        found = self._others.get(strides)
        if found is None:
            if len(self._others) >= _LAYOUTS:
                self._others.clear()
            found = self._others[strides] = UnbiasedForward(self._problem, q, k, v)
        return found

    def _attend(self, c: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, c.q
        plan, is_static = self._choice.plan()
        out = self._output()
        tensors = {"q": q, "k": c.k, "v": c.v, "o": out, "scale": scale_operand(c.scale)}
        lse = None
        if is_static:
            if self._lse:
                lse = _static_stats(p, tensors)
        else:
            if self._lse and self._ragged_stats:
                lse = tensors["stats"] = token_major_lse(p, q)
            if self._gaps:
                out.zero_()
                if lse is not None:
                    lse.fill_(-torch.inf)
            tensors |= self._offsets(tensors, c)
            if self._stats:
                found = tensors["stats"] = q.new_full(self._stats, -torch.inf, dtype=torch.float32)
                lse = found.view(-1, p.q_heads, self._stats[2])[: p.batch, :, : p.q_len]
        plan.execute(tensors)
        return _with_sinks(c, out, lse)


class BiasForward:
    """Calls with a bias: always a static plan, built at once."""

    __slots__ = ("_keys", "_problem", "_stats")

    def __init__(self, p: Problem) -> None:
        self._problem = p
        self._stats = _needs_stats(p)
        self._keys = StaticKeys(p, self._stats)

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p = self._problem
        added, *qkv, _ = masked(p, call, whole=False)
        q, k, v = [readable(x) for x in qkv]
        out = token_major(q, p.batch, p.q_heads, p.q_len, p.value_dim)
        tensors = {"q": q, "k": k, "v": v, "o": out, "bias": added}
        plan = plans.shared.get(self._keys.of(tensors))
        tensors["scale"] = scale_operand(call.scale)
        lse = _static_stats(p, tensors) if self._stats else None
        plan.execute(tensors)
        return _with_sinks(call, out, lse)


def _needs_stats(p: Problem) -> bool:
    return p.return_lse or bool(p.grads) or p.sinks


def _static_stats(p: Problem, tensors: dict[str, Tensor]) -> Tensor:
    """Gives a static plan room for its log-sum-exp `[B,Hq,Sq]`."""
    found = tensors["stats"] = tensors["q"].new_empty((p.batch, p.q_heads, p.q_len), dtype=torch.float32)
    return found


def token_major_lse(p: Problem, like: Tensor) -> Tensor:
    """Room for a log-sum-exp `[B,H,S]` whose memory runs `[B,S,H]`: then any length can have the same plan."""
    return like.new_empty((p.batch, p.q_len, p.q_heads), dtype=torch.float32).transpose(1, 2)


def _with_sinks(c: Call, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if c.sinks is not None and lse is not None:
        from .sinks import add_sinks  # and with it Triton

        return out, add_sinks(out, lse, c.sinks)
    return out, lse
