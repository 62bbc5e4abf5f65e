"""What a row has to give: attention in float64, a piece of the queries at a time, in code of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import Row, Tensors

MOST_BYTES = 1 << 29  #: of one piece's scores; autograd and the softmax hold several of them
#: The largest relative error (norm of the difference over the norm) of a right result: forward, gradients.
LIMITS = {torch.bfloat16: (8e-3, 1.6e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-5, 2e-5)}


def truth(row: Row, x: Tensors) -> tuple[Tensor, ...]:
    """The output in float64; of a training row also the gradients of q, k, v (and of the mask, where it has one)."""
    wide = x._replace(**{name: getattr(x, name).detach().double() for name in ("q", "k", "v", "grad_out")})
    if row.mask_gradient and wide.mask is not None:
        wide = wide._replace(mask=wide.mask.detach().double())
    wide = wide.with_gradients(row)
    batch, heads, _, q_len, kv_len, _, value_dim = row.sizes
    out = torch.empty(batch, heads, q_len, value_dim, dtype=torch.float64, device=x.q.device)
    leaves = wide.leaves(row)
    gradients = [torch.zeros_like(leaf) for leaf in leaves] if row.training else []
    step = max(1, MOST_BYTES // (8 * batch * heads * kv_len))
    for start in range(0, q_len, step):
        piece = slice(start, min(start + step, q_len))
        with torch.set_grad_enabled(row.training):
            found = _attend(row, wide, piece)
        out[:, :, piece] = found.detach()
        if row.training:
            for total, part in zip(gradients, torch.autograd.grad(found, leaves, wide.grad_out[:, :, piece])):
                total += part
    return (out, *gradients)


def _attend(row: Row, x: Tensors, piece: slice) -> Tensor:
    """The outputs of some queries, `[B, Hq, queries, Dv]`."""
    q = x.q[:, :, piece].unflatten(1, (row.sizes[2], row.group))  # [B, Hkv, group, queries, D]
    rows = q.flatten(2, 3)
    scores = (rows @ x.k.mT).unflatten(2, q.shape[2:4]) / math.sqrt(row.sizes[5])
    if row.softcap is not None:
        scores = row.softcap * torch.tanh(scores / row.softcap)
    hidden = ~row.visible(x, piece.start, piece.stop)[:, None, None]
    if x.mask is not None:
        mask = x.mask[..., piece, :].expand(*(1,) * (4 - x.mask.ndim), *x.mask[..., piece, :].shape)
        if mask.shape[1] != 1:
            mask = mask.unflatten(1, (row.sizes[2], row.group))
        else:
            mask = mask[:, :, None]
        if mask.dtype == torch.bool:
            hidden = hidden | ~mask
        else:
            scores = scores + mask.double()
    scores = scores.masked_fill(hidden, -torch.inf)
    most = scores.detach().amax(-1, keepdim=True).clamp(min=-1e300)
    if x.sinks is not None:
        sinks = x.sinks.detach().double().view(1, row.sizes[2], row.group, 1, 1)
        most = torch.maximum(most, sinks)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    if x.sinks is not None:
        total = total + (sinks - most).exp()
    weights = weights / total.clamp(min=1e-300)
    found: Tensor = (weights.flatten(2, 3) @ x.v).unflatten(2, q.shape[2:4])
    return found.flatten(1, 2)


def errors(row: Row, x: Tensors, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """The relative error of the output, and the largest one of the gradients (0 without); inf where one is NaN.

    Queries that are padding count as 0: fastattn gives that, others give what they like."""
    found = []
    for i, (a, b) in enumerate(zip(result, expected, strict=True)):
        if i == 0 and row.left_padded:
            real = row.visible(x).any(-1)[:, None, :, None]
            a = a.masked_fill(~real, 0)
        error = ((a.double() - b).norm() / b.norm()).item()
        found.append(error if math.isfinite(error) else math.inf)
    return found[0], max(found[1:], default=0.0)
