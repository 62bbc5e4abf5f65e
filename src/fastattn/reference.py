"""Exact attention in plain torch: any device, any dtype, any feature, forward and backward.

With float64 inputs it is the reference of the test suite; the dispatcher uses it when no other backend serves a call.
It loops over chunks of queries, so its memory is O(S): no score matrix larger than one chunk exists. The backward
computes each chunk's scores again.

    s = softcap(scale * q k^T) + mask,    p = exp(s - lse),    lse = log(sum_j exp(s_j) + exp(sink)),    o = p v

Backward (with delta = rowsum(p * do v^T) - dlse; Dao et al., FlashAttention, 2022, appendix B; the sink is one more
logit whose value vector is 0):

    ds = p * (do v^T - delta),    dsink = -sum_rows exp(sink - lse) * delta,    dmask = ds,
    dr = ds * (1 - (softcap(r) / cap)^2),    dq = scale * dr k,    dk = scale * dr^T q,    dv = p^T do
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import masks
from .call import Call, Gradients, Problem, as_token_major, token_major, work_dtype

_TINY = 1e-30  #: below any sum of weights, of which the largest is 1; the sum of a fully masked row is 0
#: Scores of one chunk, by device: 8 MB stays in a CPU's cache, 128 MB fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}


def forward(problem: Problem, call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output `[B,Hq,Sq,Dv]` in q's dtype and the log-sum-exp `[B,Hq,Sq]` (float32; float64 for float64)."""
    p, work = problem, work_dtype(problem.dtype)
    out = token_major(call.q, p.batch, p.q_heads, p.q_len, p.value_dim)
    lse = call.q.new_empty((p.batch, p.q_heads, p.q_len), dtype=work)
    k, v = call.k.to(work), call.v.to(work)
    for start, stop in _chunks(p):
        rows = _scores(p, call, k, start, stop)
        probabilities, _, total = _softmax(rows.scores, call.sinks)
        out[:, :, start:stop] = _unfold(p, _fold(p, probabilities) @ masks.clear(v, rows.unseen))
        lse[:, :, start:stop] = total
    return out, lse


def backward(problem: Problem, call: Call, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """The gradients named by `problem.grads`, whichever backend ran the forward."""
    p, work = problem, work_dtype(problem.dtype)
    k, v = call.k.to(work), call.v.to(work)
    dq = token_major(call.q, p.batch, p.q_heads, p.q_len, p.head_dim) if "q" in p.grads else None
    dk = torch.zeros_like(k) if "k" in p.grads else None
    dv = torch.zeros_like(v) if "v" in p.grads else None
    dmask = call.q.new_zeros(p.mask_shape, dtype=work) if "m" in p.grads else None
    dsinks = call.q.new_zeros(p.q_heads, dtype=work) if "s" in p.grads else None
    for start, stop in _chunks(p):
        rows = _scores(p, call, k, start, stop)
        probabilities, sink, _ = _softmax(rows.scores, call.sinks)
        do = grad_out[:, :, start:stop].to(work)
        if rows.fully_masked is not None:  # their gradient is 0, also where the upstream gradient is NaN
            do = masks.clear(do, rows.fully_masked[..., None])
        dp = _unfold(p, _fold(p, do) @ masks.clear(v, rows.unseen).mT)
        # Not rowsum(do * o), which is equal but for the rounding of o: in rows of few keys that error is the largest.
        delta = (probabilities * dp).sum(-1)
        if grad_lse is not None:
            dlse = grad_lse[:, :, start:stop].to(work)
            # The log-sum-exp of a fully masked row is its sink, or the constant -inf.
            delta = delta - (dlse if p.sinks else masks.clear(dlse, rows.fully_masked))
        if dv is not None:
            dv += _fold(p, probabilities).mT @ _fold(p, do)
        if dsinks is not None:
            dsinks -= (sink * delta).sum((0, 2))
        ds = probabilities * (dp - delta[..., None])
        if dmask is not None:
            masks.rows_of(dmask, start, stop).add_(masks.reduce_to(ds, _rows_shape(p.mask_shape, stop - start)))
        if p.softcap:
            ds = ds * (1 - rows.capped.div(p.softcap).square())
        if dq is not None:
            dq[:, :, start:stop] = _unfold(p, _fold(p, ds) @ masks.clear(k, rows.unseen)) * call.scale
        if dk is not None:
            dk += (_fold(p, ds).mT @ _fold(p, rows.q)) * call.scale
    return Gradients(
        q=dq,
        k=None if dk is None else as_token_major(dk, call.k.dtype),
        v=None if dv is None else as_token_major(dv, call.v.dtype),
        mask=None if dmask is None or call.mask is None else dmask.to(call.mask.dtype),
        sinks=None if dsinks is None or call.sinks is None else dsinks.to(call.sinks.dtype),
    )


class _Rows(NamedTuple):
    """The scores of one chunk of queries, and which keys and rows were cleared to keep unseen values out of them."""

    scores: Tensor  #: [B,Hq,rows,Skv], -inf where not seen
    capped: Tensor  #: the same before masking, 0 where not seen (what softcap's derivative needs)
    q: Tensor  #: [B,Hq,rows,D], 0 in fully masked rows
    unseen: Tensor | None  #: keys no query of the chunk sees, [B|1,Hkv|1,Skv,1]
    fully_masked: Tensor | None  #: queries that see no key, [B|1,Hq|1,rows]


def _scores(p: Problem, call: Call, k: Tensor, start: int, stop: int) -> _Rows:
    q = call.q[:, :, start:stop].to(k.dtype)
    seen = masks.visibility(call, start, stop)
    unseen = fully_masked = None
    if seen is not None:
        fully_masked = ~seen.any(-1)
        unseen = masks.unseen_by_all(seen.any(2), p.kv_heads)
        q = masks.clear(q, fully_masked[..., None])
    scores = _unfold(p, _fold(p, q) @ k.mT) * call.scale
    if p.softcap:
        scores = torch.tanh(scores / p.softcap) * p.softcap
    capped = scores
    if p.mask == "additive" and call.mask is not None:
        scores = scores + masks.narrowed(masks.rows_of(call.mask, start, stop), k.dtype)
    if seen is not None:
        capped = masks.clear(capped, ~seen)
        scores = scores.masked_fill(~seen, -torch.inf)
    return _Rows(scores, capped, q, unseen, fully_masked)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor]:
    """The keys' probabilities, the sink's `[B,Hq,rows]` (0 without sinks), and the log-sum-exp `[B,Hq,rows]`.

    The backward calls it again instead of computing exp(scores - lse): under a mask of finfo.min the log-sum-exp is too
    coarse to tell how many keys share a row.
    """
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None]
        top = torch.maximum(top, sink)
    top = masks.clear(top, top == -torch.inf)  # a fully masked row
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sinks is None:
        return weights / total.clamp(min=_TINY)[..., None], 0.0, top + total.log()
    extra = torch.exp(sink - top)
    total = total + extra
    divisor = total.clamp(min=_TINY)
    return weights / divisor[..., None], extra / divisor, top + total.log()


def _chunks(p: Problem) -> list[tuple[int, int]]:
    if p.empty and not (p.batch and p.q_heads and p.q_len):
        return []
    budget = CHUNK_ELEMENTS.get(p.device, CHUNK_ELEMENTS["cuda"])
    rows = max(1, budget // max(1, p.batch * p.q_heads * p.kv_len))
    return [(start, min(start + rows, p.q_len)) for start in range(0, p.q_len, rows)]


def _rows_shape(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return (*shape[:2], 1 if shape[2] == 1 else rows, shape[3])


# K/V are never repeated for grouped heads: the heads of a group become more rows of one matrix product.
def _fold(p: Problem, x: Tensor) -> Tensor:
    """`[B,Hq,rows,X]` -> `[B,Hkv,group * rows,X]`."""
    return x.reshape(p.batch, p.kv_heads, p.group * x.shape[2], x.shape[3])


def _unfold(p: Problem, x: Tensor) -> Tensor:
    """`[B,Hkv,group * rows,X]` -> `[B,Hq,rows,X]`."""
    return x.reshape(p.batch, p.q_heads, x.shape[2] // p.group, x.shape[3])
