"""The mask kinds and their conversions, each in one place.

Four arguments decide which keys a query sees; a key must pass all of them: the mask (bool tensor, additive tensor,
`Intervals` or `Segments`), the band (causal, window), the lengths of the keys and the lengths of the queries. The
functions of this module combine the four.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ._compat import torch as torch_internals
from .call import Call, Problem
from .common.checks import check_count, check_flag, check_ints

LOWEST = -1e38  #: masks as finfo.min does, and is finite in float32 after a multiplication by log2(e)


class Intervals(NamedTuple):
    """One interval of visible keys per query row: row i of batch b sees the keys `[lo, hi)`.

    The compact form of left and right padding, packing, windows and chunked prefill: O(S) numbers instead of a mask of
    O(S^2). Rows with `hi <= lo` are fully masked: their output is 0. Bounds outside of 0..Skv are clamped (with
    FASTATTN_DEBUG=1 they raise).

    lo, hi: int32 tensors `[B, Sq]`, or `[B, 1]` when all rows of a batch entry share one interval, on the inputs'
    device. B may be 1 to stand for every batch entry.
    """

    lo: Tensor
    hi: Tensor


class Segments(NamedTuple):
    """Sequences that lie side by side: each query sees the keys of its own segment, all or causally.

    It describes left padding, packing and batches of different lengths by one column per sequence, O(N) numbers instead
    of O(S), which only the device reads. Kernels take it as offsets and lengths; nothing of size S^2 is made. `packed`
    and `left_padded` make one.

    table: int32 `[3, N]` (batch entry; first token; one past the last token: of queries and keys alike) or `[5, N]`
        (batch entry; first query; one past the last query; first key; one past the last key); or `[2, N]`, `[4, N]`:
        the same without the batch entry, all in the first. On the inputs' device, of any strides, sorted by batch entry
        and first query, segments of one batch entry not overlapping, empty ones before what begins at the same query.
        Bounds outside of 0..S are clamped (with FASTATTN_DEBUG=1 they raise). Queries in no segment, or in one without
        keys, are fully masked: their output is 0.
    causal: a query sees the keys up to its own position, aligned to the lower right of its segment: query i of a
        segment of m queries and n keys sees its keys j <= i + n - m. The op's `window` counts the same positions.
    """

    table: Tensor
    causal: bool = False

    @staticmethod
    def packed(cu_seqlens: Tensor, cu_seqlens_kv: Tensor | None = None, *, causal: bool = False) -> Segments:
        """N sequences end to end in the first batch entry.

        cu_seqlens, cu_seqlens_kv: int32 `[N + 1]`, cumulative lengths of the queries' and of the keys' sequences (the
        same unless given): sequence n holds the tokens `cu[n] <= t < cu[n + 1]`.

        Raises ValueError or TypeError, naming the argument.
        """
        check_ints("cu_seqlens", cu_seqlens, "[sequences + 1]", 1)
        check_flag("causal", causal)
        if cu_seqlens_kv is not None:
            check_ints("cu_seqlens_kv", cu_seqlens_kv, "[sequences + 1]", 1)
            for what in ("shape", "device"):
                expected, got = getattr(cu_seqlens, what), getattr(cu_seqlens_kv, what)
                if expected != got:
                    expected, got = (list(x) if what == "shape" else x for x in (expected, got))
                    raise ValueError(f"cu_seqlens_kv: expected {what} {expected} as of cu_seqlens, got {got}")
        return Segments(packed_table(cu_seqlens, cu_seqlens_kv), causal)

    @staticmethod
    def left_padded(padding: Tensor, q_len: int, kv_len: int, *, causal: bool = True) -> Segments:
        """One sequence per batch entry, at its right end. The queries are the last q_len of kv_len tokens (the first
        ones of no sequence where there are more).

        padding: int32 `[B]` on the inputs' device, tokens of padding before the first real one, of kv_len; read on the
            device alone, clamped to 0..kv_len (with FASTATTN_DEBUG=1 the op raises).
        q_len, kv_len: Sq and Skv of the call.

        Raises ValueError or TypeError, naming the argument.
        """
        check_ints("padding", padding, "[batch]")
        check_flag("causal", causal)
        check_count("q_len", q_len, 0)
        check_count("kv_len", kv_len, 0)
        row = torch.arange(padding.shape[0], dtype=torch.int32, device=padding.device)
        end = torch.full_like(padding, kv_len)
        if q_len == kv_len:
            return Segments(torch.stack([row, padding, end]), causal)
        first = (padding.clamp(0, kv_len) - (kv_len - q_len)).clamp(min=0)
        return Segments(torch.stack([row, first, torch.full_like(padding, q_len), padding, end]), causal)


def packed_table(cu_seqlens: Tensor, cu_seqlens_kv: Tensor | None = None) -> Tensor:
    """The table of `Segments.packed`, in memory of its own: the lengths may change after the call."""
    both = (cu_seqlens,) if cu_seqlens_kv is None else (cu_seqlens, cu_seqlens_kv)
    if not torch_internals.unrecorded(*both):
        return torch.stack([part for x in both for part in (x[:-1], x[1:])])
    if cu_seqlens_kv is None:
        return packed_view(cu_seqlens).clone(memory_format=torch.contiguous_format)
    return torch.cat([packed_view(cu_seqlens), packed_view(cu_seqlens_kv)])


def packed_view(cu_seqlens: Tensor) -> Tensor:
    """The same of one tensor without a copy: each of the two rows is a window of the cumulative lengths. For tensors
    that are `unrecorded`."""
    (step,) = cu_seqlens.stride()
    return torch_internals.strided_view(cu_seqlens, (2, cu_seqlens.shape[0] - 1), (step, step), 0)


def as_intervals(problem: Problem, call: Call) -> tuple[Problem, Call]:
    """The same call with its segments and its band written as Intervals."""
    lo, hi = (x.expand(problem.batch, -1).contiguous() for x in bounds(call))
    shape = (problem.batch, problem.q_len)
    return (
        replace(problem, mask="intervals", mask_shape=shape, left=-1, right=-1),
        call._replace(lo=lo, hi=hi, segments=None, left=-1, right=-1),
    )


def kv_lengths(call: Call) -> Tensor | int:
    """Keys per batch entry: Skv, an int, without `kv_lengths`; else int32 `[B]`, clamped to 0..Skv."""
    total = call.k.shape[2]
    return total if call.kv_lengths is None else call.kv_lengths.clamp(0, total)


def q_lengths(call: Call) -> Tensor | int:
    """Queries per batch entry: Sq, an int, without `q_lengths`; else int32 `[B]`, clamped to 0..Sq."""
    total = call.q.shape[2]
    return total if call.q_lengths is None else call.q_lengths.clamp(0, total)


def bounds(call: Call, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """The keys `[lo, hi)` that band, lengths, Intervals and Segments let each of the queries `start:stop` see.

    Returns two int32 tensors `[B|1, stop - start]`. A bool or additive mask is not part of it.
    """
    if call.segments is not None:
        sizes = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        return segment_bounds(call.segments, *sizes, call.left, call.right, start, stop)
    q_len, kv_len = q_lengths(call), kv_lengths(call)
    rows = torch.arange(start, call.q.shape[2] if stop is None else stop, device=call.q.device, dtype=torch.int32)
    rows = rows[None, :]
    end: Tensor | int = kv_len if isinstance(kv_len, int) else kv_len[:, None]
    queries: Tensor | int = q_len if isinstance(q_len, int) else q_len[:, None]
    position = rows + (end - queries)  # lower-right alignment: the last query stands on the last key
    lo = torch.zeros_like(position) if call.left < 0 else (position - call.left).clamp(min=0)
    hi = torch.zeros_like(position) + end if call.right < 0 else position + call.right + 1
    hi = torch.minimum(hi, end) if isinstance(end, Tensor) else hi.clamp(max=end)
    if call.lo is not None and call.hi is not None:
        columns = slice(start, stop) if call.lo.shape[1] != 1 else slice(None)
        lo = torch.maximum(lo, call.lo[:, columns])
        hi = torch.minimum(hi, call.hi[:, columns])
    if isinstance(queries, Tensor):
        hi = torch.where(rows < queries, hi, 0)
    return lo, hi


def segment_bounds(
    table: Tensor,
    batch: int,
    q_total: int,
    kv_total: int,
    left: int = -1,
    right: int = -1,
    start: int = 0,
    stop: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`bounds` for a `Segments.table`, in a batch of `batch` entries with q_total queries and kv_total keys each."""
    has_rows = table.shape[0] % 2
    q_first, q_end = table[has_rows].clamp(0, q_total), table[has_rows + 1].clamp(0, q_total)
    first, end = table[-2].clamp(0, kv_total), table[-1].clamp(0, kv_total)
    row = table[0] if has_rows else torch.zeros_like(q_first)
    tokens = torch.arange(start, q_total if stop is None else stop, dtype=torch.int32, device=table.device)
    if not table.shape[1]:
        zeros = tokens.new_zeros(batch, tokens.shape[0])
        return zeros, zeros
    # Positions in the flattened batch, in which the starts of all segments are sorted.
    starts = row.long() * q_total + q_first
    flat = torch.arange(batch, device=table.device)[:, None] * q_total + tokens
    n = (torch.searchsorted(starts, flat, right=True) - 1).clamp(min=0)
    entry = torch.arange(batch, dtype=torch.int32, device=table.device)[:, None]
    inside = (row[n] == entry) & (tokens >= q_first[n]) & (tokens < q_end[n])
    position = tokens + (end - q_end)[n]  # the segment's last query stands on its last key
    lo, hi = first[n], end[n]
    if left >= 0:
        lo = torch.maximum(lo, position - left)
    if right >= 0:
        hi = torch.minimum(hi, position + right + 1)
    return lo, torch.where(inside, hi, 0)


def rows_of(mask: Tensor, start: int, stop: int | None) -> Tensor:
    """The query rows `start:stop` of a 4-D mask that may be broadcast along them."""
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]


def visibility(call: Call, start: int = 0, stop: int | None = None) -> Tensor | None:
    """Which keys the queries `start:stop` see: bool, broadcastable to `[B, Hq, rows, Skv]`; None means all of them.

    A key under -inf of an additive mask counts as not seen.
    """
    seen = None
    has_lengths = call.q_lengths is not None or call.kv_lengths is not None
    if call.left >= 0 or call.right >= 0 or call.lo is not None or call.segments is not None or has_lengths:
        lo, hi = bounds(call, start, stop)
        keys = torch.arange(call.k.shape[2], device=call.k.device, dtype=torch.int32)
        seen = ((keys >= lo[..., None]) & (keys < hi[..., None]))[:, None]
    if call.mask is not None:
        mask = rows_of(call.mask, start, stop)
        mask = mask if mask.dtype == torch.bool else mask > -torch.inf
        seen = mask if seen is None else seen & mask
    return seen


def additive(call: Call, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor | None:
    """All masking of the queries `start:stop` as one tensor of `dtype` to add to the scores, or None without masking.

    Broadcastable to `[B, Hq, rows, Skv]`; -inf where a query does not see a key.
    """
    seen = visibility(call, start, stop)
    if seen is None:
        return None
    if call.mask is None or call.mask.dtype == torch.bool:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return torch.where(seen, narrowed(rows_of(call.mask, start, stop), dtype), -torch.inf)


def narrowed(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask cast to `dtype`. Finite values stay finite, also where the range of `dtype` is smaller."""
    if mask.dtype == torch.float64 and dtype != torch.float64:
        most = torch.finfo(dtype).max
        mask = torch.where(mask.isinf(), mask, mask.clamp(-most, most))
    return mask.to(dtype)


def in_base_2(mask: Tensor) -> Tensor:
    """An additive mask for kernels that multiply it by log2(e), so clamped that finite values stay finite.

    Otherwise finfo.min would become -inf, and a row that holds only finfo.min would be fully masked.
    """
    if mask.dtype == torch.float16:
        return mask
    return mask.clamp(min=LOWEST).masked_fill_(mask == -torch.inf, -torch.inf)


def reduce_to(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums a gradient `[B, Hq, rows, Skv]` over the dims along which a mask of that shape was broadcast."""
    dims = [i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1]
    return gradient.sum(dims, keepdim=True) if dims else gradient


def unseen_keys(call: Call) -> Tensor | None:
    """Keys that no query of the call sees, bool `[B|1, Hkv|1, Skv, 1]`; None if shapes alone prove that there are none.

    What such a key holds (NaN, another request's leftovers) must not reach the output, and 0 * NaN is NaN: kernels
    that multiply masked probabilities by V need these keys cleared.
    """
    # Without lengths the last query is aligned to the last key; the first query's window begins at key 0 or before.
    whole = call.left < 0 or call.left >= call.k.shape[2] - call.q.shape[2]
    if whole and all(x is None for x in (call.mask, call.lo, call.segments, call.q_lengths, call.kv_lengths)):
        return None
    if call.mask is not None and call.mask.shape[2] > 1:
        seen = visibility(call)
        assert seen is not None
        seen = seen.any(dim=2)
    else:
        # A key is seen if more intervals have begun than ended up to it: O(S log S), without a mask of size S^2, and
        # deterministic (torch's deterministic algorithms refuse a scatter).
        lo, hi = bounds(call)
        total = call.k.shape[2]
        empty = hi <= lo
        begins, ends = (x.clamp(0, total).masked_fill(empty, total).sort(1).values for x in (lo, hi))
        keys = torch.arange(total, dtype=begins.dtype, device=begins.device).expand(begins.shape[0], total).contiguous()
        begun, ended = (torch.searchsorted(x, keys, right=True) for x in (begins, ends))
        seen = (begun > ended)[:, None]
        if call.mask is not None:
            mask = call.mask[:, :, 0]
            seen = seen & (mask if mask.dtype == torch.bool else mask > -torch.inf)
    return unseen_by_all(seen, call.k.shape[1])


def unseen_by_all(seen: Tensor, kv_heads: int) -> Tensor:
    """The keys that no head of a group sees, bool `[B|1, Hkv|1, Skv, 1]`. seen: bool `[B|1, Hq|1, Skv]`."""
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (kv_heads, -1)).any(dim=2)
    return ~seen[..., None]


def clear(x: Tensor, where: Tensor | None) -> Tensor:
    """x with 0 where `where` is True; x itself if `where` is None."""
    return x if where is None else x.masked_fill(where, 0)
