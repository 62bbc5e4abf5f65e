"""Puts together what the splits of a tile left behind: in a kernel of its own, or in the last program of the first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["q_len", "splits"])
def combine_kernel(
    scratch_ptr,  # float32: acc [B * Hkv, splits, rows, Dv], then m and l [B * Hkv, splits, rows] each
    out_ptr,  # [B, Sq, Hq, Dv]
    lse_ptr,  # [B, Hq, Sq] or None
    sinks_ptr,
    q_len,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits read at a time
):
    """One row of one tile: out = sum of exp(m_s - m) acc_s over sum of exp(m_s - m) l_s; a sink adds exp(sink - m).

    m, l and acc are those of a running softmax: the row's greatest score, the sum of exp(score - m), and the values so
    weighted. Their log-sum-exp alone would not do: m + log(l) loses l where m is as large as a mask's finfo.min.
    """
    tile = tl.program_id(0)
    r = tl.program_id(1)
    count = tl.num_programs(1)
    b = (tile // KV_HEADS).to(tl.int64)
    i = r // GROUP
    head = (tile % KV_HEADS) * GROUP + r % GROUP
    dv = tl.arange(0, BLOCK_DV)
    part = tile.to(tl.int64) * splits * count + r
    m_ptr = scratch_ptr + tl.num_programs(0).to(tl.int64) * splits * count * DV + part
    l_ptr = m_ptr + tl.num_programs(0).to(tl.int64) * splits * count

    s = tl.arange(0, MAX_SPLITS)
    m_s = tl.load(m_ptr + s * count, mask=s < splits, other=float("-inf"))
    l_s = tl.load(l_ptr + s * count, mask=s < splits, other=0.0)
    # Splits without work come last and left no acc. (l is NaN, not 0, where the row saw a NaN: that has to show.)
    used = tl.max(tl.where(l_s != 0.0, s + 1, 0), 0)
    m = tl.max(m_s, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = tl.maximum(m, sink)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(tl.exp(m_s - base) * l_s, 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - base)
    total = tl.where(total == 0.0, 1.0, total)

    out = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(0, used, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        weight = tl.exp(tl.load(m_ptr + c * count, mask=c < used, other=float("-inf")) - base)
        acc = tl.load(
            scratch_ptr + (part + c * count)[:, None] * DV + dv[None, :],
            mask=(c < used)[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        out += tl.sum(weight[:, None] * acc, 0)

    out_at = ((b * q_len + i) * (KV_HEADS * GROUP) + head) * DV
    tl.store(out_ptr + out_at + dv, (out / total).to(out_ptr.dtype.element_ty), mask=dv < DV)
    if lse_ptr is not None:
        tl.store(lse_ptr + (b * (KV_HEADS * GROUP) + head) * q_len + i, m + tl.log(total))


@triton.jit
def put_together(
    scratch_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    tile,
    splits,
    parts,  # of all tiles: where m begins in the scratch, divided by Dv
    q_len,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,  # all numbers of the tile's output, padded
    CHUNK: tl.constexpr,
):
    """All rows of one tile at once, as `combine_kernel` does one. What other programs wrote is read past the L1."""
    count = q_len * GROUP
    x = tl.arange(0, BLOCK_R)
    r = x // DV
    valid = r < count
    head = (tile % KV_HEADS) * GROUP + r % GROUP
    first = tile.to(tl.int64) * splits * count
    m_ptr = scratch_ptr + parts * DV + first
    l_ptr = m_ptr + parts

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for begin in range(0, splits, CHUNK):
        s = begin + tl.arange(0, CHUNK)
        at = s[:, None] * count + r[None, :]
        there = (s < splits)[:, None] & valid[None, :]
        m = tl.maximum(m, tl.max(tl.load(m_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg"), 0))
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
        m = tl.maximum(m, sink)
    base = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R], tl.float32)
    for begin in range(0, splits, CHUNK):
        s = begin + tl.arange(0, CHUNK)
        at = s[:, None] * count + r[None, :]
        there = (s < splits)[:, None] & valid[None, :]
        m_s = tl.load(m_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        l_s = tl.load(l_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        acc_at = first * DV + s[:, None].to(tl.int64) * (count * DV) + x[None, :]
        acc = tl.load(scratch_ptr + acc_at, mask=there, other=0.0, cache_modifier=".cg")
        weight = tl.exp(m_s - base[None, :])
        total += tl.sum(weight * l_s, 0)
        # Splits without work left no acc. (l is NaN, not 0, where the row saw a NaN: that has to show.)
        out += tl.sum(tl.where(l_s != 0.0, weight * acc, 0.0), 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - base)
    total = tl.where(total == 0.0, 1.0, total)

    b = (tile // KV_HEADS).to(tl.int64)
    i = r // GROUP
    out_at = ((b * q_len + i) * (KV_HEADS * GROUP) + head) * DV + x % DV
    tl.store(out_ptr + out_at, (out / total).to(out_ptr.dtype.element_ty), mask=valid)
    if lse_ptr is not None:
        tl.store(lse_ptr + (b * (KV_HEADS * GROUP) + head) * q_len + i, m + tl.log(total), mask=valid & (x % DV == 0))
