"""The tensors of a call as cuDNN can take them: aligned, masked by a bias where nothing smaller says it, in keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import masks
from ...call import Call, Problem
from ...shape_cache import cached
from ..triton.launcher import native
from .graphs import Operand


def static_operand(role: str, x: Tensor) -> Operand:
    """A tensor whose shape and strides are baked into the plan. Strides of dims of size 1 mean nothing: one value."""
    strides = [x.shape[3] if size == 1 else stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return Operand(role, tuple(x.shape), (*strides, 1), x.dtype)


def packed(role: str, dims: tuple[int, int, int, int], dtype: torch.dtype) -> Operand:
    """A contiguous tensor."""
    _, b, c, d = dims
    return Operand(role, dims, (b * c * d, c * d, d, 1), dtype)


@cached(4096, "scales")
def scale_operand(value: float) -> Tensor:
    """The scale as cuDNN reads it when a plan is launched: one float32 on the host."""
    return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device="cpu")


def needs_bias(p: Problem) -> bool:
    """True when the mask has to be a bias, which is added to the scores: a band or lengths cannot express it."""
    if p.dense_mask:
        return True
    # One interval for all rows of a batch entry is an offset and a length, unless a band is aligned to what it cuts.
    return p.mask == "intervals" and (p.mask_shape[1] != 1 or p.left >= 0 or (p.right >= 0 and p.q_len > 1))


def keeps_band(p: Problem) -> bool:
    """With a bias: True when cuDNN can still apply the band itself (upper-left, no lengths): the bias stays small."""
    return p.dense_mask and p.q_len == p.kv_len and not (p.q_lengths or p.kv_lengths)


class Masked(NamedTuple):
    """A call whose mask is a bias, with 0 where it hides what lies there (-inf + NaN is NaN, and so is 0 * NaN)."""

    bias: Tensor  #: to add to the scores, `[B|1, Hq|1, Sq|1, Skv|1]`
    q: Tensor
    k: Tensor
    v: Tensor
    fully_masked: Tensor  #: queries that the bias shows nothing, bool `[B|1, Hq|1, Sq|1, 1]`


def masked(p: Problem, c: Call, whole: bool) -> Masked:
    """The call with a bias.

    whole: the last two dims of the bias must not be broadcast (the backward reads and writes past the ends of smaller
    ones: measured, 9.19, wrong gradients or an illegal access).
    """
    merge = c.mask is None or (not keeps_band(p) and (p.banded or p.q_lengths or p.kv_lengths))
    mask = _unexpanded(p, c.mask)
    dtype = mask.dtype if mask is not None and p.mask == "additive" else p.dtype
    whole_mask = mask is not None and mask.shape[2:] == (p.q_len, p.kv_len)
    if mask is not None and whole_mask and dtype != torch.float64 and native(c.q.device.type):
        from .bias_kernel import build_bias

        added, fully_masked, seen = build_bias(c, mask, dtype, merge)
        unseen: Tensor | None = masks.unseen_by_all(seen, p.kv_heads)
    else:
        added = _bias(p, c, None if merge else mask, dtype, whole)
        fully_masked = (added == -torch.inf).all(-1, keepdim=True)
        unseen = masks.unseen_keys(c)
    # One pass, where masked_fill copies first. (Not for everybody in `masks.clear`: of the layouts that come of it
    # torch's own attention made wrong gradients in three cases of the tests' grid on an H100.)
    zero = c.q.new_zeros(())
    k, v = (c.k, c.v) if unseen is None else (torch.where(unseen, zero, x) for x in (c.k, c.v))
    return Masked(added, torch.where(fully_masked, zero, c.q), k, v, fully_masked)


def _unexpanded(p: Problem, mask: Tensor | None) -> Tensor | None:
    """A mask without the copies that its caller made with `expand`: cuDNN broadcasts."""
    if mask is None or "m" in p.grads:
        return mask
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _bias(p: Problem, c: Call, mask: Tensor | None, dtype: torch.dtype, whole: bool) -> Tensor:
    """mask: all that the bias says; None: what the whole call says."""
    found = masks.additive(c, dtype) if mask is None else mask
    assert found is not None
    if found.dtype == torch.bool:
        found = torch.zeros(found.shape, dtype=dtype, device=found.device).masked_fill_(~found, -torch.inf)
    if p.mask == "additive":
        found = masks.in_base_2(found)
    if whole:
        found = found.expand(*found.shape[:2], p.q_len, p.kv_len)
    return found.contiguous()
