"""`interval_mask`, the mask function: the keys that each query sees, in O(S) numbers wherever these suffice.

transformers calls it once per forward and layer type. It returns a mask that has the shape, dtype and values of the one
that eager attention would get, and that carries the visible keys in a compact form (`lazy_mask.py`): an interval of
keys for each query, or a dense bool tensor where intervals do not suffice (padding with holes, functions that only
`vmap` can evaluate). As for eager attention, None means "every query sees every key", never "causal".

Where the host knows the numbers of an interval mask, the mask carries them as a `Band`: a window over the first few
keys, which the fastest kernels take. Padding and packing are carried as `CausalSegments`: whole sequences, which
kernels take as offsets and lengths. Masks over a `StaticCache`, whose lengths only the device knows, are in
`cache_mask.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..._compat.hf import causal_mask_function, is_tracing, sdpa_mask
from ...masks import Intervals, Segments
from .cache_mask import mask_of_cache
from .device_offset import DeviceOffset
from .intervals import Padding, find_padding, intervals_of, real_keys, scan
from .lazy_mask import Band, CausalSegments, make_mask
from .patterns import Pattern, recognise
from .segments import chunk_segments


class Extent(NamedTuple):
    """The positions of queries and keys in the sequence."""

    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int

    @property
    def end(self) -> int | None:
        """The number of keys up to the last query's own; None where only the device knows."""
        if isinstance(self.q_offset, Tensor):
            return None
        return self.q_offset + self.q_length - self.kv_offset


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function for transformers' `AttentionMaskInterface`: the mask of one layer type for one forward.

    Args:
        batch_size, q_length, kv_length: B, Sq, Skv.
        q_offset, kv_offset: position of the first query and of the first key. A static cache passes its live length
            tensor; its value now is what counts, later changes do not reach the mask.
        mask_function: bool of (batch, head, query position, key position).
        attention_mask: None, or bool `[B, positions]`, False for padding; missing positions count as padding.
        allow_is_bidirectional_skip: None may be returned where every query sees every key.
        use_vmap: the function takes only scalars.
        device, dtype: of the result.
        config: the model's; recorded, so that `asks_for_masks` knows it. Nothing else of it is read.
        kwargs: ignored, among them whether None may be returned for a causal mask: it never is.

    Returns:
        None, or the additive mask `[B, 1, Sq, Skv]` of eager attention: 0 for visible keys, the dtype's lowest number
        for others. It takes no memory until something computes with it; see `lazy_mask.py`.

    The host reads from the device at most twice a forward, never while a graph is captured or traced.
    """
    record_config(config)
    shape = batch_size, q_length, kv_length, dtype
    if isinstance(kv_offset, DeviceOffset):
        if use_vmap:
            raise ValueError("StaticCache: a mask function that only vmap can evaluate has no place for lengths by row")
        visible, live = mask_of_cache(kv_offset, q_length, kv_length, mask_function, attention_mask)
        return make_mask(visible, live, *shape)

    def evaluated() -> Tensor:
        seen = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return make_mask(seen, None, *shape)

    if use_vmap:
        return evaluated()
    readable = not is_tracing(attention_mask if attention_mask is not None else q_offset)
    pattern = recognise(mask_function)
    if pattern is not None and pattern.segments is not None:
        whole = isinstance(q_offset, int) and q_offset == kv_offset == 0
        whole = whole and pattern.segments.shape[-1] == q_length == kv_length
        if not (whole and readable and bool(pattern.sorted_segments())):
            pattern = None
    if pattern is None and not readable:
        return evaluated()

    if isinstance(q_offset, Tensor) and readable and q_length > 1:
        q_offset = int(q_offset)  # waits for the device, which only a call of many queries repays
    extent = Extent(q_length, kv_length, q_offset, kv_offset)
    positions = torch.arange(q_length, device=device)[None] + q_offset
    real = None if attention_mask is None else real_keys(attention_mask, kv_length, kv_offset)
    if pattern is None:
        found = scan(mask_function, batch_size, positions, kv_length, kv_offset, real)
        return evaluated() if found is None else make_mask(_intervals(*found, batch_size), None, *shape)

    padding = None
    if real is not None:
        padding = find_padding(real) if readable else None
        if padding is None:
            return evaluated()
    hint: Band | CausalSegments | None = _band(pattern, extent, padding)
    if hint == (kv_length, -1, -1) and allow_is_bidirectional_skip and not is_tracing(positions):
        return None
    if hint is None and readable:
        hint = _causal_segments(pattern, extent, padding, batch_size)
    if pattern.is_open:
        positions = positions[:, :1]  # all queries see the same
    lo, hi = intervals_of(pattern, positions, kv_offset, kv_length, padding)
    return make_mask(_intervals(lo, hi, batch_size), hint, *shape)


def _intervals(lo: Tensor, hi: Tensor, batch_size: int) -> Intervals:
    """int32 `[B, Sq | 1]` each, contiguous."""
    lo, hi = (x.to(torch.int32).expand(batch_size, -1).contiguous() for x in torch.broadcast_tensors(lo, hi))
    return Intervals(lo, hi)


#: Configs that masks were made for, by their ids; dropped with the configs.
_asking: dict[int, weakref.ref[Any]] = {}


def asks_for_masks(config: Any) -> bool:
    """Whether a mask was made for a config, or for one that it is a part of.

    For the layers of such a model a mask of None means every key, as for eager attention, whatever their `is_causal`.
    """
    found = _asking.get(id(config))
    return found is not None and found() is config


def record_config(config: Any) -> None:
    """Records that masks are made for a config and its parts."""
    if config is None or torch.compiler.is_compiling() or asks_for_masks(config):
        return
    key = id(config)
    _asking[key] = weakref.ref(config, lambda _: _asking.pop(key, None))
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            record_config(part)


def _band(pattern: Pattern, extent: Extent, padding: Padding | None) -> Band | None:
    """The mask as a Band over the first keys, where a Band describes all of it and the host knows the numbers."""
    keys = extent.kv_length
    if not pattern.is_open:
        chunked = 0 < pattern.chunk < keys + extent.kv_offset  # a chunk that holds all keys hides none
        if extent.end is None or chunked or pattern.segments is not None:
            return None
        if pattern.right == 0:
            keys = min(keys, extent.end)  # the rest are positions of a static cache that hold no tokens yet
        if keys != extent.end:
            return None
    if padding is not None and (padding.latest_first > 0 or padding.earliest_stop < keys):
        return None
    left = -1 if pattern.left >= keys - 1 else pattern.left
    right = -1 if pattern.right > 0 and pattern.right >= keys - 1 else pattern.right
    return Band(keys, left, right)


def _causal_segments(
    pattern: Pattern, extent: Extent, padding: Padding | None, batch_size: int
) -> CausalSegments | None:
    """The mask as CausalSegments, where it is causal with padding or packing alone, and there are several queries."""
    keys, end = extent.kv_length, extent.end
    if end is None or extent.q_length == 1 or pattern.is_open or pattern.right != 0:
        return None
    left = -1 if pattern.left >= keys - 1 else pattern.left
    chunked = 0 < pattern.chunk < keys + extent.kv_offset
    if chunked and pattern.segments is None:
        return _chunks(pattern, extent, padding, batch_size, left)
    if pattern.segments is not None:
        if padding is not None:
            return None
        ids = pattern.segments.expand(batch_size, -1)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if chunked:
            within = torch.arange(keys, device=ids.device)[None] if pattern.positions is None else pattern.positions
            begin = 0 if pattern.chunk_start is None else pattern.chunk_start[:, None]
            starts[:, 1:] |= ((within - begin) // pattern.chunk).diff(dim=-1) != 0
        row, start = (x.to(torch.int32) for x in starts.nonzero(as_tuple=True))  # waits for the device: how many?
        stop = torch.full_like(start, keys)
        stop[:-1] = torch.where(row[1:] == row[:-1], start[1:], keys)
        return CausalSegments(Segments(torch.stack([row, start, stop]), causal=True), left)
    if padding is None or end > keys:
        return None
    first, stop = (x[:, 0].to(torch.int32).expand(batch_size) for x in (padding.first, padding.stop.clamp(max=end)))
    row = torch.arange(batch_size, dtype=torch.int32, device=first.device)
    before = end - extent.q_length  # keys before the first query's own
    if not before and extent.q_length == keys:
        return CausalSegments(Segments(torch.stack([row, first, stop]), causal=True), left)
    q_first, q_stop = ((x - before).clamp(0, extent.q_length) for x in (first, stop))
    return CausalSegments(Segments(torch.stack([row, q_first, q_stop, first, stop]), causal=True), left)


def _chunks(
    pattern: Pattern, extent: Extent, padding: Padding | None, batch_size: int, left: int
) -> CausalSegments | None:
    """The mask of chunked attention, each chunk a segment."""
    if pattern.chunk_start is None or extent.end is None:
        return None
    begin = pattern.chunk_start[:, None].expand(batch_size, 1)
    start = begin.new_full((batch_size, 1), extent.end + extent.kv_offset - extent.q_length)
    first, end = start.new_full((), extent.kv_offset), start + extent.q_length
    if padding is not None:
        first, end = padding.first + extent.kv_offset, torch.minimum(end, padding.stop + extent.kv_offset)
    found = chunk_segments(pattern.chunk, begin, first, end, start, extent.q_length, extent.kv_offset, extent.kv_length)
    if extent.end == extent.q_length == extent.kv_length and not extent.kv_offset:  # each query has its key
        found = found._replace(table=found.table[:3])
    return CausalSegments(found, left)
