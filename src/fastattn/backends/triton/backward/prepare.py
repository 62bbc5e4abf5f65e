"""What the passes need of each row, found once: its log-sum-exp, and delta = rowsum(dO * O) - dlse."""

from __future__ import annotations

import triton
import triton.language as tl

from ..head_dims import load_rows
from ..masking import visible_keys, weighs
from .launch_config import STAT_BLOCK
from .scores import LOG2_E

#: Never specialised.
INTEGERS = [
    "o_sb", "o_sh", "o_si", "do_sb", "do_sh", "do_si", "lse_sb", "lse_sh", "lse_si", "dlse_sb", "dlse_sh", "dlse_si",
    "interval_sb", "interval_si", "heads", "row_blocks", "q_len", "kv_len", "left", "right",
]  # fmt: skip

STAT_ROWS = tl.constexpr(STAT_BLOCK)  #: rows of a program, of which the passes' loads of statistics hold a whole number
UNIT = tl.constexpr(8)  #: elements per unit of the strides of O and dO


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    sinks_ptr,
    stats_ptr,  # float32 [2, B, Hq, row blocks * STAT_ROWS]: the log-sum-exp, in base 2 unless BIASED, and delta; if
    # BIASED [4, ...]: the log-sum-exp again, and 0, in place of which `coarse_kernel` puts others for some rows
    dsinks_ptr,  # float32 [B * row blocks, Hq], or None
    lo_ptr,
    hi_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    o_sb,
    o_sh,
    o_si,
    do_sb,
    do_sh,
    do_si,
    lse_sb,
    lse_sh,
    lse_si,
    dlse_sb,
    dlse_sh,
    dlse_si,
    interval_sb,
    interval_si,
    heads,
    row_blocks,
    q_len,
    kv_len,
    left,
    right,
    DV: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_REST: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,  # by a tensor: which rows see a key is not known from their bounds
):
    """One block of rows of one head. The log-sum-exp of rows that see no key becomes inf: their probabilities are 0."""
    pid = tl.program_id(0)
    bh = pid // row_blocks
    block = pid - bh * row_blocks
    b = bh // heads
    head = bh - b * heads
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    i = block * STAT_ROWS + tl.arange(0, STAT_ROWS)
    i64 = i.to(tl.int64)
    valid = i < q_len
    lo, hi = visible_keys(
        b, i, valid, lo_ptr, hi_ptr, q_lengths_ptr, kv_lengths_ptr, interval_sb, interval_si, q_len, kv_len, left, right
    )
    lse = tl.load(lse_ptr + b64 * lse_sb + head64 * lse_sh + i64 * lse_si, mask=valid, other=float("-inf"))
    live = (hi > lo) & (lse > float("-inf"))
    o_at = (b64 * o_sb + head64 * o_sh + i64 * o_si) * UNIT
    do_at = (b64 * do_sb + head64 * do_sh + i64 * do_si) * UNIT
    o, o_rest = load_rows(out_ptr, o_at, live, DV, VALUE, VALUE_REST)
    do, do_rest = load_rows(do_ptr, do_at, live, DV, VALUE, VALUE_REST)
    o = o.to(tl.float32)
    delta = tl.sum(o * do.to(tl.float32), 1)
    if VALUE_REST > 0:
        delta += tl.sum(o_rest.to(tl.float32) * do_rest.to(tl.float32), 1)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        if MASKED:
            size = tl.sum(tl.abs(o), 1)
            if VALUE_REST > 0:
                size += tl.sum(tl.abs(o_rest.to(tl.float32)), 1)
            live = live & weighs(size, lse, sink)
    delta = tl.where(live, delta, 0.0)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + b64 * dlse_sb + head64 * dlse_sh + i64 * dlse_si, mask=valid, other=0.0)
        if sinks_ptr is None:  # the log-sum-exp of a row without keys is the constant -inf, with a sink it is that
            dlse = tl.where(live, dlse, 0.0)
        delta -= dlse.to(tl.float32)
    if dsinks_ptr is not None:
        weight = tl.where(lse > float("-inf"), tl.exp(sink - lse), 0.0)
        share = tl.where(valid, weight * delta, 0.0)
        tl.store(dsinks_ptr + (b64 * row_blocks + block) * heads + head, -tl.sum(share, 0))
    delta = tl.where(live, delta, 0.0)
    if not BIASED:
        lse = lse * LOG2_E
    lse = tl.where(live, lse, float("inf"))
    at = pid.to(tl.int64) * STAT_ROWS + tl.arange(0, STAT_ROWS)
    apart = tl.num_programs(0).to(tl.int64) * STAT_ROWS
    tl.store(stats_ptr + at, lse)
    tl.store(stats_ptr + apart + at, delta)
    if BIASED:
        tl.store(stats_ptr + 2 * apart + at, lse)
        tl.store(stats_ptr + 3 * apart + at, tl.zeros([STAT_ROWS], tl.float32))
