"""The integers of a call that kernels take as arguments."""

from __future__ import annotations

import math

from torch import Tensor

from ...call import Call, Problem

_LOG2_E = math.log2(math.e)
_STEEPEST = 1e38  #: that float32 holds; where a cap is so much smaller than the scale, all scores but 0 are at the cap


def band(p: Problem) -> tuple[int, int]:
    """left and right as kernels take them: an open side is as wide as all tokens, so that no position overflows."""
    far = p.q_len + p.kv_len
    left, right = (far if side < 0 else min(side, far) for side in (p.left, p.right))
    return left, right


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """What a product of q and k is multiplied with before the softcap, and what the result of that with."""
    return (min(scale / softcap, _STEEPEST), softcap) if softcap else (1.0, scale)


def exponent_factors(p: Problem, scale: float) -> tuple[float, float]:
    """`score_factors` of the kernels in plain Triton: without an additive mask the second one is for base 2."""
    inner, outer = score_factors(scale, p.softcap)
    return inner, outer if p.mask == "additive" else outer * _LOG2_E


def strides_in_units(call: Call) -> tuple[int, tuple[int, ...]]:
    """Elements of a unit, and the strides of q, k and v in units, but for the last. A stride known to be a multiple of
    8 lets 16 bytes be loaded at once."""
    flat = [stride for x in (call.q, call.k, call.v) for stride in x.stride()[:3]]
    unit = 1 if any(stride % 8 for stride in flat) else 8
    return unit, tuple([stride // unit for stride in flat])


def broadcast_strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides, 0 along the dims of which there is one; zeros without a tensor."""
    if x is None:
        return (0,) * dims
    return tuple([0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])


def same_strides(k: Tensor, v: Tensor) -> bool:
    """True when v, if it begins where k begins, is k's first columns."""
    both = zip(k.shape[:3], k.stride(), v.stride(), strict=False)
    return all(one == other for size, one, other in both if size > 1)
