"""A tensor mask that is the same for all queries, as one bias per key: what a kernel adds to exponents in base 2."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...call import Call, Problem
from ...masks import LOWEST
from .arguments import broadcast_strides
from .binaries.launcher import Launch, launcher_of
from .launcher import overlaps
from .representative import stand_in

RANGE = tl.constexpr(4)  #: numbers of a row's range
SLACK = 128  #: numbers before the first bias, so that a block that begins before key 0 can be read whole
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(LOWEST)
_MOST = tl.constexpr(2e38)  # as LOWEST, for finite values: so large that nothing else counts

_INTEGERS = ["mask_sb", "mask_sh", "mask_sk", "heads", "kv_len", "ranges_at", "bias_at"]


def is_key_mask(p: Problem) -> bool:
    """True when the problem has a bool or additive mask that is broadcast along the queries."""
    return p.dense_mask and p.mask_shape[2] == 1


@triton.jit(do_not_specialize=_INTEGERS)
def key_bias_kernel(
    memory_ptr,  # uint8: see `bounds.py`
    mask_ptr,  # bool or floating
    mask_sb,
    mask_sh,
    mask_sk,
    heads,  # of the mask
    kv_len,
    ranges_at,
    bias_at,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of the mask: its biases, and between which keys there is one that it lets be seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    h = tl.program_id(0)
    b = tl.program_id(1)
    row = b.to(tl.int64) * heads + h
    mask_row = mask_ptr + b.to(tl.int64) * mask_sb + h.to(tl.int64) * mask_sh
    bias_row = memory_ptr.to(tl.pointer_type(tl.float32)) + bias_at + row * kv_len
    first = kv_len
    end = 0
    count = 0
    other = 0  # keys with a bias that is neither 0 nor -inf
    for start in range(0, kv_len, BLOCK):
        key = start + tl.arange(0, BLOCK)
        there = key < kv_len
        at = mask_row + key.to(tl.int64) * mask_sk
        if mask_ptr.dtype.element_ty == tl.int1:
            seen = tl.load(at, mask=there, other=0) != 0
            bias = tl.where(seen, 0.0, float("-inf"))
        else:
            x = tl.load(at, mask=there, other=float("-inf"))
            if mask_ptr.dtype.element_ty != tl.float64:
                x = x.to(tl.float32)
            seen = there & (x != float("-inf"))
            # Finite values stay finite, also those that float32 does not hold.
            x = tl.where(x < _LOWEST, _LOWEST, x)
            x = tl.where((x > _MOST) & (x < float("inf")), _MOST, x).to(tl.float32)
            bias = tl.where(seen, x * _LOG2_E, float("-inf"))
        tl.store(bias_row + key, bias, mask=there)
        first = tl.minimum(first, tl.min(tl.where(seen, key, kv_len), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, key + 1, 0), 0))
        count += tl.sum(seen.to(tl.int32), 0)
        other += tl.sum((seen & (bias != 0.0)).to(tl.int32), 0)
    ranges = memory_ptr.to(tl.pointer_type(tl.int32)) + ranges_at + row * RANGE
    tl.store(ranges, tl.where(count > 0, first, 0))
    tl.store(ranges + 1, end)
    tl.store(ranges + 2, tl.where((count > 0) & ((other > 0) | (count != end - first)), 1, 0))


@triton.jit
def narrowed(lo, hi, ranges, heads):
    """Bounds of rows within the ranges that a mask's heads leave, and whether some head's biases are to be added."""
    first = tl.load(ranges)
    end = tl.load(ranges + 1)
    biased = tl.load(ranges + 2)
    for h in range(1, heads):
        its_first = tl.load(ranges + h * RANGE)
        its_end = tl.load(ranges + h * RANGE + 1)
        biased |= tl.load(ranges + h * RANGE + 2)
        biased |= ((its_first != first) | (its_end != end)).to(tl.int32)
        # A head that sees nothing has the empty range at 0.
        first = tl.where(end == 0, its_first, tl.where(its_end == 0, first, tl.minimum(first, its_first)))
        end = tl.maximum(end, its_end)
    return tl.maximum(lo, first), tl.minimum(hi, end), biased


class KeyBias:
    """Biases of calls of one kind, at a place in the memory of `Bounds`.

    ranges_at, bias_at: int32 and float32 numbers from the memory's beginning: [B'|1, H'|1, 4] (first key that the mask
    lets be seen, one past the last, 1 where biases say more than this range, unused; 0 without such a key) and
    [B'|1, H'|1, Skv], of the mask's B' and H'. end: one past the last number. strides: of the bias, along batch entries
    and heads; 0 where it is broadcast.
    """

    __slots__ = ("_launch", "bias_at", "end", "heads", "ranges_at", "strides")

    def __init__(self, p: Problem, call: Call, start: int) -> None:
        mask: Any = call.mask
        batch, self.heads = p.mask_shape[:2]
        rows = batch * self.heads
        self.ranges_at = start
        self.bias_at = start + rows * RANGE.value + SLACK
        self.end = self.bias_at + rows * p.kv_len
        self.strides = (self.heads * p.kv_len if batch > 1 else 0, p.kv_len if self.heads > 1 else 0)
        mask_strides = broadcast_strides(mask, 4)
        pdl = overlaps(p.capability)
        self._launch = launcher_of(
            key_bias_kernel,
            (self.heads, batch),
            call.q.device,
            p.capability,
            (*mask_strides[:2], mask_strides[3], self.heads, p.kv_len, self.ranges_at, self.bias_at),
            (1024, pdl),
            num_warps=4,
            **({"launch_pdl": True} if pdl else {}),
        )

    def launches(self, call: Call) -> list[Launch]:
        """See `Bounds.launches`."""
        return [(self._launch, (stand_in(torch.uint8), call.mask), ())]

    def __call__(self, call: Call, memory: Any) -> None:
        self._launch((memory, call.mask))
