"""What the passes of the backward share: from scores to probabilities, and to the gradient of the scores."""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import float_bias, tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def probabilities(s, lse, rest, mask, seen, inner, factor, BIASED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Of a tile of scores `q k^T`: the probabilities, and tanh of the scores under a softcap (else the scores).

    lse, rest: of each row, as `prepare.py` and `coarse_kernel.py` store them, along either dim; rest counts if BIASED.
    mask: entries of a tensor mask, or None; keys that it hides hold numbers. seen: which entries bounds let be seen, or
    None: all. Whatever the others hold, it ends here.
    """
    if SOFTCAP:
        s = tanh(s * inner)
    if BIASED:
        x = s * factor
        if mask is not None:
            x = x + float_bias(mask)
        # Of a coarse row lse is the largest score, which may be rounded otherwise here.
        p = tl.exp2(tl.minimum(x - lse, 0.0) * LOG2_E - rest)
    else:
        p = tl.exp2(s * factor - lse)
        if mask is not None:
            p = tl.where(mask, p, 0.0)
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    return p, s


@triton.jit
def score_gradient(p, dp, delta, seen):
    """The gradient of softmax's inputs. seen: as for `probabilities`."""
    ds = p * (dp - delta)
    if seen is not None:
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def before_softcap(ds, s, seen, SOFTCAP: tl.constexpr):
    """The gradient of `scale * q k^T`. s: as `probabilities` returns it."""
    if SOFTCAP:
        ds = ds * (1.0 - s * s)
        if seen is not None:
            ds = tl.where(seen, ds, 0.0)
    return ds
