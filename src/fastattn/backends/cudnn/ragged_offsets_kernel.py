"""The kernel behind `ragged_offsets.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=list(range(7, 18 + 3 * 9)))
def ragged_offsets_kernel(  # type: ignore[no-untyped-def]
    offsets, lengths, q_lengths, kv_lengths, lo, hi, segments,
    rows, fold, kv_group, count, batch, q_len, kv_len, interval_stride, segment_rows, segment_sr, segment_sn,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, s_b, s_h, s_t,
    HAS_Q: tl.constexpr, HAS_KV: tl.constexpr, HAS_LO: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = row // fold
    there = entry < count
    # Offsets of the surplus entries stay inside the tensors; their length 0 keeps them from being read.
    entry = tl.minimum(entry, count - 1)
    b = entry.to(tl.int64)
    head = (row % fold).to(tl.int64)
    kv_head = head // kv_group
    queries = tl.zeros_like(row) + q_len
    keys = tl.zeros_like(row) + kv_len
    first = tl.zeros_like(row)
    first_q = tl.zeros_like(row)
    if HAS_Q:
        queries = tl.minimum(tl.maximum(tl.load(q_lengths + b), 0), q_len)
    if HAS_KV:
        keys = tl.minimum(tl.maximum(tl.load(kv_lengths + b), 0), kv_len)
    if HAS_LO:
        first = tl.minimum(tl.maximum(tl.load(lo + b * interval_stride), 0), keys)
        last = tl.minimum(tl.load(hi + b * interval_stride), keys)
        keys = tl.maximum(last - first, 0)
    if HAS_SEGMENTS:
        at = segments + entry.to(tl.int64) * segment_sn
        q_row = segment_rows % 2  # a table without batch entries is one row shorter: all are in the first
        b = tl.load(at, mask=entry < count * q_row, other=0)
        b = tl.minimum(tl.maximum(b, 0), batch - 1).to(tl.int64)
        at_q = at + q_row * segment_sr
        first_q = tl.minimum(tl.maximum(tl.load(at_q), 0), q_len)
        last_q = tl.minimum(tl.maximum(tl.load(at_q + segment_sr), 0), q_len)
        queries = tl.maximum(last_q - first_q, 0)
        at_kv = at + (segment_rows - 2) * segment_sr
        first = tl.minimum(tl.maximum(tl.load(at_kv), 0), kv_len)
        last = tl.minimum(tl.maximum(tl.load(at_kv + segment_sr), 0), kv_len)
        keys = tl.maximum(last - first, 0)
    # Where there is no key, no query is to be read: it may hold anything.
    queries = tl.where(keys > 0, queries, 0)
    tl.store(lengths + row, tl.where(there, queries, 0).to(tl.int32), mask=row < rows)
    tl.store(lengths + rows + row, tl.where(there, keys, 0).to(tl.int32), mask=row < rows)
    start = first.to(tl.int64)
    start_q = first_q.to(tl.int64)
    stored = row <= rows
    step = rows + 1
    tl.store(offsets + 0 * step + row, b * q_b + head * q_h + start_q * q_t, mask=stored)
    tl.store(offsets + 1 * step + row, b * k_b + kv_head * k_h + start * k_t, mask=stored)
    tl.store(offsets + 2 * step + row, b * v_b + kv_head * v_h + start * v_t, mask=stored)
    tl.store(offsets + 3 * step + row, b * o_b + head * o_h + start_q * o_t, mask=stored)
    tl.store(offsets + 4 * step + row, b * do_b + head * do_h + start_q * do_t, mask=stored)
    tl.store(offsets + 5 * step + row, b * dq_b + head * dq_h + start_q * dq_t, mask=stored)
    tl.store(offsets + 6 * step + row, b * dk_b + kv_head * dk_h + start * dk_t, mask=stored)
    tl.store(offsets + 7 * step + row, b * dv_b + kv_head * dv_h + start * dv_t, mask=stored)
    tl.store(offsets + 8 * step + row, b * s_b + head * s_h + start_q * s_t, mask=stored)
