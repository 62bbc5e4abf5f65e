"""What the passes of the backward share: from scores to probabilities, and to the gradient of the scores."""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import float_bias, tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def probabilities(
    s, lse, rest, mask, seen, inner, factor, FULL: tl.constexpr, BIASED: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Of a tile of scores `q k^T`: the probabilities, tanh of the scores under a softcap (else the scores), and which
    entries are seen.

    lse, rest: of each row, as `prepare.py` and `coarse_kernel.py` store them, along either dim; rest counts if BIASED.
    mask: entries of a tensor mask, or None. FULL: all entries are seen, `seen` is not looked at.
    """
    if SOFTCAP:
        s = tanh(s * inner)
    if BIASED:
        x = s * factor
        if mask is not None:
            bias = float_bias(mask)
            x = x + bias
            seen = seen & (bias > float("-inf"))
        # Of a coarse row lse is the largest score, which may be rounded otherwise here.
        p = tl.exp2(tl.minimum(x - lse, 0.0) * LOG2_E - rest)
    else:
        if mask is not None:
            seen = seen & mask
        p = tl.exp2(s * factor - lse)
    if FULL:
        seen = p  # nobody looks at it, but Triton 3.6 has no None to return
    else:
        # Whatever a key that the row does not see holds, it ends here.
        p = tl.where(seen, p, 0.0)
    return p, s, seen


@triton.jit
def score_gradient(p, dp, delta, seen, FULL: tl.constexpr):
    """The gradient of softmax's inputs."""
    ds = p * (dp - delta)
    if not FULL:
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def before_softcap(ds, s, seen, FULL: tl.constexpr, SOFTCAP: tl.constexpr):
    """The gradient of `scale * q k^T`. s: as `probabilities` returns it."""
    if SOFTCAP:
        ds = ds * (1.0 - s * s)
        if not FULL:
            ds = tl.where(seen, ds, 0.0)
    return ds
