"""The arguments of torch's function as those of our op.

torch takes any leading dims and broadcasts them, aligns "causal" to the upper left, and has no grouped heads unless
asked. The op takes `[B, H, S, D]`, and aligns to the lower right. What cannot be said in the op's words is not
translated, and goes to torch, which computes it or says what is wrong with it.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...validation import FLOATING, Arguments

_HEADS = -3  #: the dim of the heads, where there are four or more


class Translated(NamedTuple):
    """Arguments of the op, and the shape of torch's output: None where the op's output has it already."""

    arguments: Arguments
    shape: tuple[int, ...] | None = None


def translate(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Translated | str:
    """The op's arguments; or, as a string, why they are none.

    q `[..., Hq, Sq, D]`, k `[..., Hkv, Skv, D]`, v `[..., Hkv, Skv, Dv]`, mask broadcastable to `[..., Hq, Sq, Skv]`.
    Looks at shapes, dtypes and devices alone, never at strides; nothing is copied but masks and inputs of five and more
    dims whose leading dims cannot be viewed as one.
    """
    wrong = _mismatch(q, k, v, mask, is_causal)
    if wrong:
        return wrong
    rank = max(q.dim(), k.dim(), v.dim())
    if rank == 4 and q.dim() == k.dim() == v.dim() and q.shape[0] == k.shape[0] == v.shape[0]:
        shape = None
    else:
        if enable_gqa and min(q.dim(), k.dim(), v.dim()) < 3:
            return "enable_gqa with tensors that have no heads"
        found = folded(q, k, v, mask, enable_gqa)
        if isinstance(found, str):
            return found
        q, k, v, mask, shape = found
    score_heads = max(q.shape[1], k.shape[1])
    heads = _with_heads(q, k, v, enable_gqa)
    if isinstance(heads, str):
        return heads
    q, k, v = heads
    if mask is not None:
        if mask.dim() < 4:  # else it stays the very tensor that it was
            mask = mask[(None,) * (4 - mask.dim())]
        full = (q.shape[0], score_heads, q.shape[2], k.shape[2])
        for size, whole in zip(mask.shape, full):
            if size != 1 and size != whole:
                return _SHAPE
    if not is_causal:
        return Translated(Arguments(q, k, v, mask), shape)
    rows, keys = q.shape[2], k.shape[2]
    if rows <= keys:  # nobody sees the keys behind the last query: without them both alignments are one
        if rows < keys:
            k, v = k[:, :, :rows], v[:, :, :rows]
        return Translated(Arguments(q, k, v, "causal"), shape)
    # Query i stands at i + keys - rows for us, and may look as far to the right as brings it back to i.
    return Translated(Arguments(q, k, v, window=(-1, rows - keys)), shape)


_SHAPE = "a mask whose shape does not broadcast"


def _mismatch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """What fastattn takes no call with; "" if it is nothing."""
    if not q.dtype == k.dtype == v.dtype:
        return "query, key and value of several dtypes"
    if q.dtype not in FLOATING:
        return f"{q.dtype}"
    if not q.device == k.device == v.device:
        return "tensors on several devices"
    if min(q.dim(), k.dim(), v.dim()) < 2:
        return "tensors of fewer than two dims"
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return "shapes that do not match"
    if mask is None:
        return ""
    if is_causal:
        return "attn_mask together with is_causal"
    if mask.dtype != torch.bool and mask.dtype != q.dtype and mask.dtype != torch.float32:
        return f"a mask of {mask.dtype}"
    if mask.device != q.device:
        return "tensors on several devices"
    if not 2 <= mask.dim() <= max(q.dim(), k.dim()):  # of the scores, in which v has no part
        return _SHAPE
    return ""


def _with_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor] | str:
    """q, k, v `[B, H, S, D]` with heads that the op takes."""
    hq, hk, hv = q.shape[1], k.shape[1], v.shape[1]
    if hq == hk and hk == hv:
        return q, k, v
    if enable_gqa:
        if hk != hv:
            return "key and value of different numbers of heads"
        if hk == 0 or hq % hk != 0:
            return "shapes that do not match"
        return q, k, v
    heads = max(hq, hk, hv)
    for size in (hq, hk, hv):
        if size != 1 and size != heads:
            return "shapes that do not match"
    if hk != hv:
        k, v = (x.expand(x.shape[0], heads, x.shape[2], x.shape[3]) for x in (k, v))
    if hq != heads:
        q = q.expand(q.shape[0], heads, q.shape[2], q.shape[3])
    return q, k, v


def folded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]] | str:
    """Tensors of any rank with their leading dims as one batch dim, and the shape of torch's output; or why not.

    Of three or fewer dims each entry becomes a head of one, unless there are grouped heads.
    """
    rank = max(q.dim(), k.dim(), v.dim())
    headless = rank < 4 and not enable_gqa
    if headless and q.dim() == k.dim() == v.dim() == 3 and (mask is None or mask.dim() == 2):
        batch = q.shape[0]
        if k.shape[0] == batch == v.shape[0]:  # what nearly all such calls are: five operators instead of 17
            return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask, (batch, q.shape[1], v.shape[2])
    if headless:
        # Heads of one: then the output in memory is what torch's is, contiguous.
        q, k, v = (x.unsqueeze(_HEADS) for x in (q, k, v))
        mask = mask.unsqueeze(_HEADS) if mask is not None and mask.dim() > 2 else mask
    whole = max(rank, 4)
    q, k, v = (x[(None,) * (whole - x.dim())] for x in (q, k, v))
    if 0 in (q.shape[_HEADS], k.shape[_HEADS], v.shape[_HEADS]):
        return "no heads"
    lead: list[int] = []
    for sizes in zip(q.shape[:_HEADS], k.shape[:_HEADS], v.shape[:_HEADS]):
        size = next((n for n in sizes if n != 1), 1)
        if any(n != 1 and n != size for n in sizes):
            return "shapes that do not match"
        lead.append(size)
    batch = prod(lead)
    if mask is not None and mask.dim() > 3:
        mask = mask[(None,) * (whole - mask.dim())]
        for n, one, other in zip(mask.shape[:_HEADS], q.shape[:_HEADS], k.shape[:_HEADS]):
            if n != 1 and n != one and n != other:
                return _SHAPE
        if prod(mask.shape[:_HEADS]) == 1:
            mask = mask.reshape(1, *mask.shape[_HEADS:])
        else:
            mask = mask.expand(*lead, *mask.shape[_HEADS:]).reshape(batch, *mask.shape[_HEADS:])
    heads = () if headless else (max(q.shape[_HEADS], k.shape[_HEADS], v.shape[_HEADS]),)
    shape = (*lead, *heads, q.shape[-2], v.shape[-1])[-rank:]
    q, k, v = (x.expand(*lead, *x.shape[_HEADS:]).reshape(batch, *x.shape[_HEADS:]) for x in (q, k, v))
    return q, k, v, mask, shape
