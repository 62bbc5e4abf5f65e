"""The geometry of plans, shared by forward and backward: how dynamic plans are dimensioned, and what keys name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...call import Problem
from .graphs import Operand, PlanKey
from .operands import keeps_band, packed, static_operand
from .support import GENERIC, is_packed, sums_lengths

SCALE = Operand("scale", (1, 1, 1, 1), (1, 1, 1, 1), torch.float32)
_LAYOUTS = 32  #: of which a kind of call keeps the keys
MIN_SEGMENTS = 16  #: packed sequences that a plan has room for, at the least; a place left empty costs 1 to 4 us
MIN_TOTAL = 1 << 10  #: tokens of all of them that its backward has room for, at the least
MIN_CAPACITY = 1 << 14  #: length that a dynamic plan is declared for, at the least; a larger one costs no time


def total(p: Problem) -> int:
    """Tokens that the workspace of a backward for packed sequences is made for; 0 where cuDNN can make it only for all
    rows at full length.

    Its accumulators lie as dq, dk and dv do, so what counts is where the last head of the last token ends: one more.
    """
    if not (is_packed(p) and sums_lengths(p)):
        return 0
    return capacity(p.batch * max(p.q_len, p.kv_len), MIN_TOTAL) + 1


def may_be_static(p: Problem) -> bool:
    """True when a call without a bias can have a static plan."""
    return not leaves_gaps(p) and not (p.banded and p.q_len > p.kv_len)


def band(p: Problem) -> tuple[int, int]:
    """(left, right) as the graph needs them: the right bound says nothing to a single query, and costs a kernel."""
    return (p.left, -1) if p.q_len == 1 else (p.left, p.right)


def lower_right(p: Problem) -> bool:
    """False when upper-left says the same: it is 1.4 to 1.6 times faster in the backward."""
    if p.mask == "segments":
        return p.mask_shape[0] >= 4
    return p.q_len != p.kv_len or p.q_lengths or p.kv_lengths


def capacity(length: int, least: int = MIN_CAPACITY) -> int:
    """The length that the dynamic plan for a call is declared for."""
    return max(least, 1 << (length - 1).bit_length())


def ragged_operand(role: str, x: Tensor, rows: int, fold: int, length: int) -> Operand:
    """A tensor `[B,H,S,D]` as a dynamic plan knows it: its heads folded into `rows` ragged entries.

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
    """True when a dynamic plan may leave some queries and keys untouched: their lengths are data."""
    return p.q_lengths or p.kv_lengths or p.mask in ("intervals", "segments")


def ragged_stats(p: Problem) -> bool:
    """True when the log-sum-exp of a dynamic plan can lie token-major, at offsets of its own."""
    return p.capability not in GENERIC or not p.grads


def stats_operand(p: Problem, rows: int, fold: int, length: int) -> Operand:
    """The log-sum-exp of a dynamic plan."""
    dims = (rows, p.q_heads // fold, length, 1)
    if not ragged_stats(p):
        return packed("stats", dims, torch.float32)
    return Operand("stats", dims, (p.q_heads * length, 1, p.q_heads, 1), torch.float32)


def static_key(
    p: Problem,
    tensors: dict[str, Tensor],
    stats: bool = True,
    biased: bool = False,
    direction: str = "forward",
    deterministic: bool = False,
) -> PlanKey:
    """The plan for just these tensors. biased: the bias says what the band does not say of itself."""
    operands = [static_operand(role, x) for role, x in tensors.items()] + [SCALE]
    if stats:
        operands.append(packed("stats", (p.batch, p.q_heads, p.q_len, 1), torch.float32))
    left, right = band(p) if not biased or keeps_band(p) else (-1, -1)
    lower = not biased and lower_right(p)
    return PlanKey(direction, p.index, tuple(operands), left, right, lower, deterministic)


class StaticKeys:
    """The keys of the biased calls of one problem, made once for each layout: to make and to hash one takes 40 us."""

    __slots__ = ("_kept", "_more", "_problem")

    def __init__(self, p: Problem, stats: bool = True, direction: str = "forward") -> None:
        """See `static_key`."""
        self._problem = p
        self._more = stats, direction
        self._kept: dict[tuple[Any, ...], PlanKey] = {}

    def of(self, tensors: dict[str, Tensor], deterministic: bool = False) -> PlanKey:
        """tensors: the same roles and dtypes in every call."""
        layout = deterministic, *[(x.shape, x.stride()) for x in tensors.values()]
        found = self._kept.get(layout)
        if found is None:
            if len(self._kept) >= _LAYOUTS:
                self._kept.clear()
            stats, direction = self._more
            found = static_key(self._problem, tensors, stats, True, direction, deterministic)
            self._kept[layout] = found
        return found


def length_operands(rows: int, roles: Iterable[str]) -> list[Operand]:
    one = (1, 1, 1, 1)
    offsets = [Operand(f"ragged_{role}", (rows + 1, 1, 1, 1), one, torch.int64) for role in roles]
    return [*offsets, *(Operand(role, (rows, 1, 1, 1), one, torch.int32) for role in ("seq_q", "seq_kv"))]
