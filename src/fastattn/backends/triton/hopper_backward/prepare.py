"""What is done before the main kernel of the Hopper backward, once for each tile of queries: plain Triton.

- delta = rowsum(dO * O) - dlse and the log-sum-exp in base 2, side by side, `[B * Hq * tiles, 2, ROWS]`: first the
  log-sum-exp. It is +inf in rows past the tensor and in those that see nothing: their P is 0.
- Zeros where the main kernel adds, and in its counters (`order.py`). Not in dQ's sums of a tile whose rows all see
  nothing, which `finish.py` does not read: a padded batch would be written, and read, to its full length.
- The sinks' gradient, -sum exp(sink - lse) * delta, of each tile.
- With bounds of rows: copies of the queries and dO of tiles in which some query sees nothing, with 0 in those. What is
  in these rows may be NaN, which a P of 0 does not make 0 in a product. Tiles in which none sees anything are among
  them where the main kernel visits them, between two tiles that see a block of keys. A mask of keys may hide all that a
  query has within its bounds: then the log-sum-exp tells, with a sink the output, which is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bounds_kernel import FIELDS, HEADER
from ..masking import weighs

_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-2e38)
_ZEROS = tl.constexpr(4096)  # numbers that are cleared at a time
PREPARE_INTEGERS = [
    "batch", "heads", "q_len", "tiles", "blocks", "zeros", "dim8", "value8", "o_b", "o_h", "o_s", "g_b", "g_h", "g_s",
    "q_b", "q_h", "q_s", "l_b", "l_h", "l_s", "d_b", "d_h", "d_s",
]  # fmt: skip


@triton.jit
def _clear(sums_ptr, i, COUNT: tl.constexpr):
    """The i-th part of as many sums. i: int64."""
    tl.store(sums_ptr + i * COUNT + tl.arange(0, COUNT), tl.zeros([COUNT], tl.float32))


@triton.jit
def hidden(lse):
    """1 where all of a tile's rows see nothing, else 0. lse: what is stored of them."""
    return tl.min((lse == float("inf")).to(tl.int32), 0)


@triton.jit
def visited(extents_ptr, b, m, blocks):
    """1 where the main kernel visits tile m of batch entry b, else 0."""
    found = 0
    for start in range(0, blocks, 64):
        n = start + tl.arange(0, 64)
        at = extents_ptr + (b.to(tl.int64) * blocks + n) * 4
        first = tl.load(at, mask=n < blocks, other=0)
        end = tl.load(at + 1, mask=n < blocks, other=0)
        found = tl.maximum(found, tl.max(((first <= m) & (m < end)).to(tl.int32), 0))
    return found


@triton.jit(do_not_specialize=PREPARE_INTEGERS)
def prepare_kernel(
    out_ptr,  # [B, Hq, Sq, Dv], strides o_ in units of 8
    grad_out_ptr,  # strides g_
    lse_ptr,  # float32 [B, Hq, Sq], strides l_ in elements
    grad_lse_ptr,  # or None; strides d_
    sinks_ptr,  # [Hq], or None
    q_ptr,  # [B, Hq, Sq, D], strides q_; from here on None without bounds
    bounds_ptr,
    extents_ptr,
    clean_q_ptr,  # [B, Hq, tiles * ROWS, DIM]
    clean_grad_out_ptr,
    rows_ptr,  # float32, see above
    dq_sum_ptr,  # float32 [B * Hq * tiles, ROWS * DIM]
    dkv_sum_ptr,  # float32, `zeros` times 4096; or None
    sink_sums_ptr,  # float32 [B * tiles, Hq], or None
    counters_ptr,  # int32: one a tile, one a block of keys where programs share it, one more; or None
    batch,
    heads,
    q_len,
    tiles,
    blocks,
    zeros,
    dim8,
    value8,
    o_b,
    o_h,
    o_s,
    g_b,
    g_h,
    g_s,
    q_b,
    q_h,
    q_s,
    l_b,
    l_h,
    l_s,
    d_b,
    d_h,
    d_s,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BIASED: tl.constexpr,  # keys have biases: what a query sees differs from head to head
    KEYS: tl.constexpr,  # of a block
):
    pid = tl.program_id(0)
    place = pid.to(tl.int64)
    if dkv_sum_ptr is not None:
        for chunk in range(pid, zeros, tl.num_programs(0)):
            _clear(dkv_sum_ptr, place * 0 + chunk, _ZEROS)
    if counters_ptr is not None:
        tl.store(counters_ptr + pid, 0)
        for i in range(pid, zeros // (2 * KEYS * DIM // _ZEROS) + 1, tl.num_programs(0)):
            tl.store(counters_ptr + tl.num_programs(0) + i, 0)
    if bounds_ptr is None:
        _clear(dq_sum_ptr, place, ROWS * DIM)
    bh = pid // tiles
    m = pid - bh * tiles
    b = bh // heads
    h = bh - b * heads
    row = tl.arange(0, ROWS)
    i = m * ROWS + row
    there = i < q_len
    seeing = there
    if bounds_ptr is not None:
        at = bounds_ptr + HEADER + batch.to(tl.int64) * tiles * FIELDS + (b.to(tl.int64) * tiles + m) * ROWS + row
        lo = tl.load(at)
        hi = tl.load(at + batch.to(tl.int64) * tiles * ROWS)
        seeing = there & (lo < hi)
    c = tl.arange(0, DIM)
    b64 = b.to(tl.int64)
    i64 = i.to(tl.int64)
    inside = seeing[:, None] & (c < value8 * 8)[None, :]
    o_at = b64 * (o_b * 8) + h.to(tl.int64) * (o_h * 8) + i64[:, None] * (o_s * 8) + c[None, :]
    g_at = b64 * (g_b * 8) + h.to(tl.int64) * (g_h * 8) + i64[:, None] * (g_s * 8) + c[None, :]
    out = tl.load(out_ptr + o_at, mask=inside, other=0.0)
    if BIASED:
        size = tl.sum(tl.abs(out.to(tl.float32)), 1)
        row_lse = tl.load(lse_ptr + b64 * l_b + h.to(tl.int64) * l_h + i64 * l_s, mask=there, other=float("-inf"))
        live = row_lse > float("-inf")
        if sinks_ptr is not None:
            live = live & weighs(size, row_lse, tl.load(sinks_ptr + h).to(tl.float32))
        seeing = seeing & live
        inside = inside & live[:, None]
    grad_out = tl.load(grad_out_ptr + g_at, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + b64 * l_b + h.to(tl.int64) * l_h + i64 * l_s, mask=there, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if grad_lse_ptr is not None:
        grad_lse = tl.load(grad_lse_ptr + b64 * d_b + h.to(tl.int64) * d_h + i64 * d_s, mask=there, other=0.0)
        # The log-sum-exp of a row that sees nothing is its sink, or a constant.
        if sinks_ptr is None:
            grad_lse = tl.where(seeing, grad_lse, 0.0)
        delta -= grad_lse
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        found = tl.sum(tl.where(there, tl.exp2((sink - lse) * _LOG2_E) * delta, 0.0), 0)
        tl.store(sink_sums_ptr + (b64 * tiles + m) * heads + h, -found)
    pair = rows_ptr + place * (2 * ROWS) + row
    if BIASED:
        lse = tl.maximum(lse, _LEAST)  # finite in base 2, also where the mask is as low as can be
    lse = tl.where(seeing, lse * _LOG2_E, float("inf"))
    tl.store(pair, lse)
    tl.store(pair + ROWS, tl.where(seeing, delta, 0.0))
    if bounds_ptr is not None:
        needed = 1
        if hidden(lse) > 0:
            needed = visited(extents_ptr, b, m, blocks)
        else:
            _clear(dq_sum_ptr, place, ROWS * DIM)
        some = tl.sum(seeing.to(tl.int32), 0)
        holes = (some < tl.sum(there.to(tl.int32), 0)).to(tl.int32)
        if BIASED:
            tl.store(extents_ptr + batch.to(tl.int64) * (blocks * (4 + KEYS) + tiles) + pid, holes)
        elif h == 0:
            tl.store(extents_ptr + batch.to(tl.int64) * blocks * 4 + b * tiles + m, holes)
        if holes * needed > 0:
            copy = place * (ROWS * DIM) + row[:, None] * DIM + c[None, :]
            tl.store(clean_grad_out_ptr + copy, grad_out)
            q_at = b64 * (q_b * 8) + h.to(tl.int64) * (q_h * 8) + i64[:, None] * (q_s * 8) + c[None, :]
            q = tl.load(q_ptr + q_at, mask=seeing[:, None] & (c < dim8 * 8)[None, :], other=0.0)
            tl.store(clean_q_ptr + copy, q)
