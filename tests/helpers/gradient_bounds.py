"""How far gradients of 16-bit kernels may be from float64's, given the output that the backward was given.

A backward computes delta = rowsum(dO * O) from the output as the forward rounded it. What that rounding does is no
error of the backward, and in rows whose dS nearly cancel it is most of the result; but it is known: a delta that is
larger by `shift` in a row does what a gradient of -shift of the row's log-sum-exp does. With that in the truth, what is
left is small in every row:

- P and dS are rounded to 16 bits, and so are the results: relative to the result, `WORST` and `ROW`.
- dP and delta are sums of float32; where dP = delta (rows that see one key) nothing but their rounding is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORST = {torch.bfloat16: 8e-3, torch.float16: 2e-3}  #: norm of the error over the norm of the truth
ROW = {
    torch.bfloat16: 0.03,
    torch.float16: 0.0075,
}  #: of one row, whose norm counts as a fifth of a typical one's or more
CAPPED = 4  #: times `ROW` with softcap: the approximate tanh leaves little of 1 - tanh^2 right, where that is small
_SUMS = 2.0**-20  #: rounding of dP - delta, over a typical |dP|: tensor cores cut partial sums off after 23 bits


def shift(rounded: Tensor, out: Tensor, grad_out: Tensor, there: Tensor) -> Tensor:
    """How much larger delta is `[B, H, Sq]`, float64, for the rounded output. there: bool, rows that see a key."""
    larger = ((rounded.double() - out) * grad_out.double()).sum(-1)
    return torch.where(there, larger, 0.0)


def floors(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, there: Tensor, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """By gradient ("q", "k", "v"): the rounding of dP - delta, in all, and in one row at worst."""
    typical = v.double().square().mean().sqrt() * grad_out.double().norm(dim=-1)  # |dP| of a random value
    error = _SUMS * scale * torch.where(there, typical, 0.0)  # of dS, where P is 1
    of_dq = error * k.double().square().sum(-1).mean().sqrt()
    of_dk = (error * q.double().norm(dim=-1)).norm()  # the rows' keys may all be the same
    nothing = torch.zeros_like(of_dk)
    return {"q": (of_dq.norm(), 4 * of_dq), "k": (of_dk, of_dk), "v": (nothing, nothing)}


def errors(found: Tensor, truth: Tensor, floor: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """In all, and of the worst row: to compare with `WORST` and `ROW`. NaN where something is NaN."""
    difference, by_row = (found.double() - truth).norm(dim=-1), truth.norm(dim=-1)
    tiny = 1e-30  # where nothing is seen all is 0
    total = difference.norm() / (truth.norm() + floor[0] / WORST[dtype] + tiny)
    typical = by_row.square().mean().sqrt()
    row = (difference / (by_row.clamp(min=0.2 * typical.item()) + floor[1] / ROW[dtype] + tiny)).max()
    return total.item(), row.item()
