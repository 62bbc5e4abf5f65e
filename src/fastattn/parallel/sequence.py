"""The arguments of a call over ranks as a `Pattern` for plans, and as `Work` for the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ..call import Call
from ..masks import Segments
from ..validation import Arguments, validated
from . import cost
from .layout import Layout
from .plan import Pattern

Lengths = Tensor | Sequence[int]


def pattern_of(
    layout: Layout,
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str | Segments | None,
    cu_seqlens: Lengths | None,
    window: tuple[int, int] | None,
    sinks: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Pattern, Call]:
    """The whole sequence's mask, and the call with its tensors in one dtype. Raises ValueError on bad arguments."""
    if mask is not None and mask != "causal" and not isinstance(mask, Segments):
        raise ValueError(f'mask: expected None, "causal" or Segments of the whole sequence, got {type(mask).__name__}')
    call = validated(Arguments(q, k, v, mask if isinstance(mask, str) else None, sinks, window, softcap), scale)
    own = layout.size(rank)
    for name, x in (("q", q), ("k", k)):
        if x.shape[2] != own:
            raise ValueError(
                f"{name}: expected the {own} of {layout.length} tokens that rank {rank} of {layout.ranks} holds "
                f"({layout.order}), got {x.shape[2]}"
            )
    right, segments = call.right, None
    if isinstance(mask, Segments):
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None beside Segments")
        if mask.table.dim() != 2 or mask.table.shape[0] not in (2, 3):
            raise ValueError(f"mask.table: expected [3, segments], got {list(mask.table.shape)}")
        entries = [] if mask.table.shape[0] == 3 else [0]  # without its row all are in the first batch entry
        segments = tuple((a, b, c) for a, b, c in (entries + column for column in mask.table.T.tolist()))
        right = 0 if mask.causal else right
    elif cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected one batch entry, got {q.shape[0]}: use Segments")
        cuts = [int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
        if cuts != sorted(cuts) or (cuts and (cuts[0] < 0 or cuts[-1] > layout.length)):
            raise ValueError(f"cu_seqlens: expected ascending numbers within 0..{layout.length}, got {cuts}")
        segments = tuple((0, a, b) for a, b in pairwise(cuts) if a < b)
    batch = 1 if segments is None else q.shape[0]
    return Pattern(layout.length, batch, call.left, right, segments), call


def work_of(layout: Layout, pattern: Pattern, heads: tuple[int, ...], backward: bool) -> cost.Work:
    """The call for the cost model; the same on every rank."""
    batch, q_heads, kv_heads, head_dim, value_dim, itemsize = heads
    length, ranks = layout.length, layout.ranks
    if pattern.plain:
        pairs = length * (length + 1) / 2 if pattern.right == 0 else float(length) ** 2
        shares = [1 / ranks]
        if pattern.right == 0 and layout.order == "contiguous":
            shares = [(2 * ranks - 1) / ranks**2]
    else:
        lo, hi = pattern.bounds()
        seen = (hi - lo).clamp(min=0).double().mean(0)
        pairs = float(seen.sum())
        shares = [float(seen[layout.positions(r)].sum()) / max(pairs, 1.0) for r in range(ranks)]
    needed = 0.75 if pattern.right == 0 else 1.0
    reach = length if pattern.left < 0 else pattern.left
    if pattern.segments is not None:
        reach = min(reach, max((stop - start for _, start, stop in pattern.segments), default=0))
    needed = min(needed, cost.sparse_need(reach, length, ranks))
    return cost.Work(
        length, q_heads, kv_heads, head_dim, value_dim, batch, itemsize, pairs, max(shares), needed, backward
    )  # fmt: skip
