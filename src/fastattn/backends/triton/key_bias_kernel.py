"""The kernel of `key_bias.py`, and what reads its ranges."""

from __future__ import annotations

import triton
import triton.language as tl

from ...masks import LOWEST
from . import key_bias

RANGE = tl.constexpr(key_bias.RANGE_NUMBERS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(LOWEST)
_MOST = tl.constexpr(2e38)  # as LOWEST, for finite values: so large that nothing else counts

_INTEGERS = ["mask_sb", "mask_sh", "mask_sk", "heads", "kv_len", "ranges_at", "bias_at"]


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
