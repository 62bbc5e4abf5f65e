"""The last program of a tile to be done combines what all have left: its launch is the only one. See `counting.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_last(
    scratch_ptr,
    counter_ptr,  # int32, of this tile, 0 before and after
    out_ptr,
    lse_ptr,
    sinks_ptr,
    tile,
    tiles,
    splits,
    used,  # splits that had work, which come first
    q_len,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,  # read at a time
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """As `combine_kernel` does, of all rows of a tile, a few at a time, and of a few splits at a time, in order."""
    tl.debug_barrier()  # all warps have written their part; the atomic operation makes that known, and learns of others
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if done == splits - 1:
        tl.store(counter_ptr, 0)  # for the next launch: nobody else counts any more
        count = q_len * GROUP
        parts = tiles.to(tl.int64) * splits * count
        part = tile.to(tl.int64) * splits * count
        b = (tile // KV_HEADS).to(tl.int64)
        dv = tl.arange(0, COLUMNS)
        for begin in tl.range(0, count, ROWS, num_stages=1):
            r = begin + tl.arange(0, ROWS)
            valid = r < count
            head = (tile % KV_HEADS) * GROUP + r % GROUP
            m = tl.full([ROWS], float("-inf"), tl.float32)
            l = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in tl.range(0, used, SPLITS, num_stages=1):
                s = first + tl.arange(0, SPLITS)
                there = (s < used)[:, None] & valid[None, :]
                at = part + s[:, None] * count + r[None, :]
                m_s = tl.load(scratch_ptr + parts * DV + at, mask=there, other=float("-inf"))
                l_s = tl.load(scratch_ptr + parts * (DV + 1) + at, mask=there, other=0.0)
                acc_s = tl.load(
                    scratch_ptr + at[:, :, None] * DV + dv[None, None, :],
                    mask=there[:, :, None] & (dv < DV)[None, None, :],
                    other=0.0,
                )
                m_new = tl.maximum(m, tl.max(m_s, 0))
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
                decay = tl.exp(m - base)
                weight = tl.exp(m_s - base[None, :])
                l = l * decay + tl.sum(weight * l_s, 0)
                acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * acc_s, 0)
                m = m_new
            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32)
                m_new = tl.maximum(m, sink)
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
                decay = tl.exp(m - base)
                l = l * decay + tl.exp(sink - base)
                acc = acc * decay[:, None]
                m = m_new
            total = tl.where(l == 0.0, 1.0, l)
            i = r // GROUP
            out_at = ((b * q_len + i) * (KV_HEADS * GROUP) + head) * DV
            tl.store(
                out_ptr + out_at[:, None] + dv[None, :],
                (acc / total[:, None]).to(out_ptr.dtype.element_ty),
                mask=valid[:, None] & (dv < DV)[None, :],
            )
            if lse_ptr is not None:
                tl.store(lse_ptr + (b * (KV_HEADS * GROUP) + head) * q_len + i, m + tl.log(total), mask=valid)
