"""Ragged offsets and lengths of the tensors of a dynamic plan, computed on the device by one small kernel.

The plan sees `rows` ragged entries, one per batch entry and folded head, each with its own offset into every tensor
and its own number of queries and keys. With the heads folded into the batch, the token stride (and, when a group of
query heads stays together, the stride between them) is all that a plan has to know about a layout.
"""

from __future__ import annotations

import sys
from itertools import count

import torch
from torch import Tensor

from ..._compat import torch as torch_internals
from ...call import Call, Problem
from ...shape_cache import Reason, shape_cache
from ..scratch import may_keep
from ..triton.launcher import Launcher
from .graphs import KEY_SIDE, RAGGED

MOST_KEPT = 1 << 14  #: calls and streams of which offsets are kept
MOST_BYTES = 32 << 20  #: that they take on all GPUs together


def _bytes(offsets: dict[str, Tensor]) -> int:
    storages = [x.untyped_storage() for x in offsets.values()]  # views, of two allocations
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


#: By the number of a `RaggedOffsets` and the stream; those of kernels that are dropped go with them.
_kept = shape_cache.section(
    "offsets", MOST_KEPT, weigh=_bytes, max_bytes=MOST_BYTES, dropped_for=[Reason.BACKEND_REFUSED]
)
_numbers = count()


class RaggedOffsets:
    """Offsets and lengths for calls of one problem and one set of strides; where nothing in them is data, made once."""

    __slots__ = ("_fold", "_launcher", "_number", "_rows", "_static")

    def __init__(self, p: Problem, rows: int, fold: int) -> None:
        self._rows = rows
        self._fold = fold
        self._static = not (p.q_lengths or p.kv_lengths or p.mask != "none")
        self._number = next(_numbers)
        self._launcher: list[Launcher] = []

    def __call__(self, tensors: dict[str, Tensor], c: Call) -> dict[str, Tensor]:
        """See `ragged_offsets`."""
        stream = torch_internals.raw_stream(c.q.device.index) if self._static else 0
        if not (self._static and may_keep(stream)):
            return ragged_offsets(tensors, self._rows, self._fold, c, self._launcher)
        # By stream: what one computed, another may not read unordered.
        name = self._number, stream
        found = _kept.get(name)
        if found is None:
            # Triton takes 0.3 s to import: a process's first call does without.
            make = ragged_offsets if "triton" in sys.modules else ragged_offsets_from_host
            found = _kept[name] = make(tensors, self._rows, self._fold, c)
        return found


def ragged_offsets(
    tensors: dict[str, Tensor], rows: int, fold: int, c: Call, kept: list[Launcher] | None = None
) -> dict[str, Tensor]:
    """Offsets (elements, int64 `[rows + 1,1,1,1]`) and lengths (int32 `[rows,1,1,1]`) of a call with a dynamic plan.

    tensors: by role (those of `RAGGED` that take part), each `[B,H,S,D]`, the statistics `[B,H,S]`; q and k must be
        there.
    rows: ragged entries of the plan, at least fold times the batch entries or segments; the surplus gets length 0.
    fold: heads folded into the batch: Hkv (a group of query heads stays together) or Hq.
    c: its lengths; its Intervals `[B|1,1]`, the visible keys of each batch entry; or its segments.
    kept: where the launcher is kept between calls of one problem and one set of strides; empty before the first.
    """
    launcher = kept[0] if kept else _launcher(tensors, rows, fold, c)
    if kept is not None and not kept:
        kept.append(launcher)
    q = tensors["q"]
    offsets = q.new_empty((len(RAGGED), rows + 1, 1, 1, 1), dtype=torch.int64)
    lengths = q.new_empty((2, rows, 1, 1, 1), dtype=torch.int32)
    # The kernel reads them one after another; validation lets any strides through.
    given = [None if x is None else x.contiguous() for x in (c.q_lengths, c.kv_lengths, c.lo, c.hi)]
    launcher((offsets, lengths, *given, c.segments))
    return _named(tensors, offsets, lengths)


def _launcher(tensors: dict[str, Tensor], rows: int, fold: int, c: Call) -> Launcher:
    """For calls whose tensors lie as these do."""
    from .ragged_offsets_kernel import ragged_offsets_kernel

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
    interval_stride = 0 if c.lo is None or c.lo.shape[0] == 1 else c.lo.shape[1]
    # Of segments the kernel reads any strides: the rows of a table may be parts of one tensor (`Segments.view`).
    segment_rows, count = (0, batch) if c.segments is None else c.segments.shape
    segment_strides = (0, 0) if c.segments is None else c.segments.stride()
    block = 128
    return Launcher(
        ragged_offsets_kernel,
        (-(-(rows + 1) // block),),
        q.device,
        (
            rows,
            fold,
            fold // kv_heads,
            count,
            batch,
            q_len,
            kv_len,
            interval_stride,
            segment_rows,
            *segment_strides,
            *strides,
        ),
        (
            c.q_lengths is not None,
            c.kv_lengths is not None,
            c.lo is not None,
            c.segments is not None,
            block,
        ),
        num_warps=4,
    )


def ragged_offsets_from_host(tensors: dict[str, Tensor], rows: int, fold: int, c: Call) -> dict[str, Tensor]:
    """The same for a call without lengths, Intervals or segments, computed by the host."""
    q, k = tensors["q"], tensors["k"]
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    row = torch.arange(rows + 1)
    entry, head = (row // fold).clamp(max=batch - 1), row % fold
    offsets = torch.zeros((len(RAGGED), rows + 1), dtype=torch.int64)
    for i, role in enumerate(RAGGED):
        x = tensors.get(role)
        if x is not None:
            part = head // (fold // kv_heads) if role in KEY_SIDE else head * (q_heads // fold)
            offsets[i] = entry * x.stride(0) + part * x.stride(1)
    lengths = torch.tensor([[q_len if kv_len else 0], [kv_len]], dtype=torch.int32) * (row[:-1] < batch * fold)
    # From memory that is not pinned: the copy has left it when the call returns, and waits for nothing on the device.
    return _named(
        tensors, *(x[..., None, None, None].to(q.device, non_blocking=True) for x in (offsets, lengths.int()))
    )


def _named(tensors: dict[str, Tensor], offsets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    found = {_NAMES[role]: x for role, x in zip(RAGGED, offsets.unbind(), strict=True) if role in tensors}
    found["seq_q"], found["seq_kv"] = lengths.unbind()
    return found


_NAMES = {role: f"ragged_{role}" for role in RAGGED}
