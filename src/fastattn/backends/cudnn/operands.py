"""The tensors of a call as cuDNN can take them: aligned, masked by a bias where nothing smaller says it, in keys."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ... import masks
from ...problem import Call, Problem
from .graphs import Operand


def exact(role: str, x: Tensor) -> Operand:
    """A tensor whose shape and strides are baked into the plan. Strides of dims of size 1 mean nothing: one value."""
    strides = [x.shape[3] if size == 1 else stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return Operand(role, tuple(x.shape), (*strides, 1), x.dtype)


def packed(role: str, dims: tuple[int, int, int, int], dtype: torch.dtype) -> Operand:
    """A contiguous tensor."""
    _, b, c, d = dims
    return Operand(role, dims, (b * c * d, c * d, d, 1), dtype)


@lru_cache(maxsize=4096)
def scale_operand(value: float) -> Tensor:
    """The scale as cuDNN reads it when a plan is launched: one float32 on the host."""
    return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device="cpu")


def needs_bias(p: Problem) -> bool:
    """True when what masks can only be said by a tensor added to the scores (causal, window and lengths cannot)."""
    if p.dense_mask:
        return True
    # One interval for all rows of a batch entry is an offset and a length, unless a band is aligned to what it cuts.
    return p.mask == "intervals" and (p.mask_shape[1] != 1 or p.left >= 0 or (p.right >= 0 and p.q_len > 1))


def keeps_band(p: Problem) -> bool:
    """With a bias: True when cuDNN can still apply the band itself (upper-left, no lengths): the bias stays small."""
    return p.dense_mask and p.q_len == p.kv_len and not (p.q_lengths or p.kv_lengths)


def bias(p: Problem, c: Call, whole: bool) -> Tensor:
    """What masks, as a tensor to add to the scores, `[B|1, Hq|1, Sq|1, Skv|1]`.

    whole: the last two dims must not be broadcast (the backward reads and writes past the ends of smaller ones:
    measured, 9.19, wrong gradients or an illegal access).
    """
    if c.mask is None or (not keeps_band(p) and (p.banded or p.q_lengths or p.kv_lengths)):
        dtype = c.mask.dtype if p.mask == "additive" and c.mask is not None else p.dtype
        found = masks.additive(c, dtype)
        assert found is not None
    else:
        mask = c.mask
        for dim, stride in enumerate(mask.stride()):
            if stride == 0 and "m" not in p.grads:  # expanded by the caller: let cuDNN broadcast
                mask = mask.narrow(dim, 0, 1)
        found = mask
        if mask.dtype == torch.bool:
            found = torch.zeros(mask.shape, dtype=p.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    if p.mask == "additive":
        found = masks.in_base_2(found)
    if whole:
        found = found.expand(*found.shape[:2], p.q_len, p.kv_len)
    return found.contiguous()


def cleared(c: Call, added: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v with 0 where a bias hides what lies there (-inf + NaN is NaN, and so is 0 * NaN), and the hidden queries.

    The last is bool `[B|1, Hq|1, Sq|1, 1]`.
    """
    unseen = masks.unseen_keys(c)
    blind = (added == -torch.inf).all(-1, keepdim=True)
    return masks.clear(c.q, blind), masks.clear(c.k, unseen), masks.clear(c.v, unseen), blind
