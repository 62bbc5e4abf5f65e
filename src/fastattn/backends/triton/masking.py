"""What Triton kernels share: which keys a row sees, what a tensor mask says, and the soft cap of scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Triton has none that its interpreter knows. Near 0, where the closed form cancels, Taylor's series."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def lengths_of(b, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len):
    """The queries and keys that a batch entry has."""
    queries = q_len
    if q_lengths_ptr is not None:
        queries = tl.minimum(tl.maximum(tl.load(q_lengths_ptr + b), 0), q_len)
    keys = kv_len
    if kv_lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(kv_lengths_ptr + b), 0), kv_len)
    return queries, keys


@triton.jit
def visible_keys(
    b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
):
    """The keys `[lo, hi)` that band, lengths and Intervals let row i see; hi <= lo: none. Equals `masks.bounds`."""
    queries, end = lengths_of(b, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len)
    position = i + (end - queries)
    lo = tl.maximum(position - left, 0)
    hi = tl.minimum(position + right + 1, end)
    if lo_ptr is not None:
        at = b.to(tl.int64) * interval_sb + i.to(tl.int64) * interval_si
        lo = tl.maximum(lo, tl.load(lo_ptr + at, mask=valid, other=0))
        hi = tl.minimum(hi, tl.load(hi_ptr + at, mask=valid, other=0))
    return lo, tl.where(valid & (i < queries), hi, 0)


@triton.jit
def float_bias(bias):
    """Entries of an additive mask as float32. What is finite stays so."""
    if bias.dtype == tl.float64:
        least = tl.minimum(tl.maximum(bias, -3.4028234663852886e38), 3.4028234663852886e38)
        bias = tl.where((bias > float("-inf")) & (bias < float("inf")), least, bias)
    return bias.to(tl.float32)


@triton.jit
def whole_pieces(last, UNIT: tl.constexpr):
    """The bound `last` of the keys that are wanted of a mask, rounded up to whole units: what lies before it is loaded
    a unit at a time. The mask has those keys: with units of more than one element it has a whole number of them."""
    return (last + UNIT - 1) // UNIT * UNIT


@triton.jit
def weighs(size, lse, sink):
    """Of rows under a tensor mask and a sink: whether their keys weigh something beside it.

    A row of which the mask hides every key has an output of 0 and the sink for its log-sum-exp. (So have rows whose
    keys together weigh nothing beside the sink: they have no gradient that would count.)

    size: the sum of the output's absolute values.
    """
    near = 4e-7 * (1.0 + tl.minimum(tl.abs(sink), 1e30))  # finite beside a sink of -inf, which is none
    return (size > 0.0) | (lse > sink + near)


@triton.jit
def mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, UNIT: tl.constexpr, ROWS: tl.constexpr, ADJACENT: tl.constexpr):
    """A mask's entries of queries i and keys j, `[queries, keys]`; `[1, keys]` of a mask that all queries share.

    there: which of them are wanted, of the same shape (see `whole_pieces`). mask_si, mask_sj: strides in units of UNIT
    elements. ADJACENT: neighbouring keys are neighbours in memory.
    """
    at = (j.to(tl.int64) if ADJACENT else j.to(tl.int64) * mask_sj * UNIT)[None, :]
    if ROWS:
        at = (i.to(tl.int64) * mask_si * UNIT)[:, None] + at
    return tl.load(mask_ptr + at, mask=there, other=0)
