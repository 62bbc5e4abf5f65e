"""Where the tensors of an any-length plan lie: offsets and lengths, computed on the device by one small kernel.

The plan sees `rows` ragged entries, one per batch entry and folded head, each with its own offset into every tensor
and its own number of queries and keys. With the heads folded into the batch, the token stride (and, when a group of
query heads stays together, the stride between them) is all that a plan has to know about a layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Call, Problem
from ..scratch import may_keep
from ..triton_launch import Launcher
from .graphs import KEY_SIDE, RAGGED


class Places:
    """Offsets and lengths for calls of one problem and one set of strides; where nothing in them is data, made once."""

    __slots__ = ("_fold", "_kept", "_rows", "_static")

    def __init__(self, p: Problem, rows: int, fold: int) -> None:
        self._rows = rows
        self._fold = fold
        self._static = not (p.q_lengths or p.kv_lengths or p.mask != "none")
        self._kept: dict[int, dict[str, Tensor]] = {}  #: by stream: what one computed, another may not read unordered

    def __call__(self, tensors: dict[str, Tensor], c: Call) -> dict[str, Tensor]:
        """See `places`."""
        if not (self._static and may_keep()):
            return places(tensors, self._rows, self._fold, c)
        stream = torch._C._cuda_getCurrentRawStream(c.q.device.index)
        found = self._kept.get(stream)
        if found is None:
            if len(self._kept) >= MOST_STREAMS:
                self._kept.clear()
            found = self._kept[stream] = places(tensors, self._rows, self._fold, c)
        return found


MOST_STREAMS = 64


def places(tensors: dict[str, Tensor], rows: int, fold: int, c: Call) -> dict[str, Tensor]:
    """Offsets (elements, int64 `[rows + 1,1,1,1]`) and lengths (int32 `[rows,1,1,1]`) of an any-length call.

    tensors: by role (those of `RAGGED` that take part), each `[B,H,S,D]`, the statistics `[B,H,S]`; q and k must be
        there.
    rows: ragged entries of the plan, at least fold times the batch entries or segments; the surplus gets length 0.
    fold: heads folded into the batch: Hkv (a group of query heads stays together) or Hq.
    c: its lengths; its Intervals `[B|1,1]`, the visible keys of each batch entry; or its segments.
    """
    q, k = tensors["q"], tensors["k"]
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = q_heads // fold
    strides = []
    for role in RAGGED:
        x = tensors.get(role)
        if x is None:
            strides += [0, 0, 0]
        else:
            strides += [x.stride(0), x.stride(1) * (1 if role in KEY_SIDE else group), x.stride(2)]
    roles = [role for role in RAGGED if role in tensors]
    offsets = torch.empty((len(RAGGED), rows + 1), dtype=torch.int64, device=q.device)
    lengths = torch.empty((2, rows), dtype=torch.int32, device=q.device)
    # The kernel reads them one after another; validation lets any strides through.
    q_lengths, kv_lengths, lo, hi, segments = (
        None if x is None else x.contiguous() for x in (c.q_lengths, c.kv_lengths, c.lo, c.hi, c.segments)
    )
    interval_stride = 0 if lo is None or lo.shape[0] == 1 else lo.stride(0)
    count = batch if segments is None else segments.shape[1]
    block = 128
    launch = Launcher(
        _places,
        (triton.cdiv(rows + 1, block),),
        q.device,
        (rows, fold, fold // kv_heads, count, batch, q_len, kv_len, interval_stride, *strides),
        (
            q_lengths is not None,
            kv_lengths is not None,
            lo is not None,
            0 if segments is None else segments.shape[0],
            block,
        ),
        num_warps=4,
    )
    launch((offsets, lengths, q_lengths, kv_lengths, lo, hi, segments))
    found = {f"ragged_{role}": offsets[RAGGED.index(role)].view(-1, 1, 1, 1) for role in roles}
    found["seq_q"], found["seq_kv"] = lengths[0].view(-1, 1, 1, 1), lengths[1].view(-1, 1, 1, 1)
    return found


@triton.jit(do_not_specialize=list(range(7, 15 + 3 * 9)))
def _places(  # type: ignore[no-untyped-def]
    offsets, lengths, q_lengths, kv_lengths, lo, hi, segments,
    rows, fold, kv_group, count, batch, q_len, kv_len, interval_stride,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, s_b, s_h, s_t,
    HAS_Q: tl.constexpr, HAS_KV: tl.constexpr, HAS_LO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
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
    if SEGMENTS:
        b = tl.minimum(tl.maximum(tl.load(segments + entry), 0), batch - 1).to(tl.int64)
        first_q = tl.minimum(tl.maximum(tl.load(segments + count + entry), 0), q_len)
        last_q = tl.minimum(tl.maximum(tl.load(segments + 2 * count + entry), 0), q_len)
        queries = tl.maximum(last_q - first_q, 0)
        first = tl.minimum(tl.maximum(tl.load(segments + (SEGMENTS - 2) * count + entry), 0), kv_len)
        last = tl.minimum(tl.maximum(tl.load(segments + (SEGMENTS - 1) * count + entry), 0), kv_len)
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
