"""The layers of `kv_cache.StaticCache`: the memory and lengths of `fastattn.cache`, under transformers' Cache API.

transformers calls a cache twice in each forward: `get_mask_sizes` before the first layer, once per layer type, and
`update` in every layer, with the new keys and values. Both work from lengths on the device, so that a captured step is
right for every length. Where the host knows the lengths too, steps of many queries get no more keys than there are.

A layer with a window (or a chunk) keeps only so many tokens, as a ring: token t lies at t % window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat.hf import CacheLayerMixin
from ...cache.lengths import Lengths, capturing
from ...cache.memory import KVMemory
from .device_offset import DeviceOffset


class Kind(NamedTuple):
    """What a layer keeps."""

    size: int  #: tokens
    window: int  #: the size again, if that is less than the capacity, 0 else
    is_sliding: bool  #: transformers makes the masks of windows and chunks from the first layer that is


class LayerMemory:
    """Keys and values of one layer, all rows; allocated when the first are stored, whose shapes they take."""

    def __init__(self, kind: Kind, batch: int, dtype: torch.dtype | None) -> None:
        self.kind, self.batch, self.dtype = kind, batch, dtype
        self.made: KVMemory | None = None

    def make(self, k: Tensor, v: Tensor) -> KVMemory:
        """Allocates memory for keys and values like these, if there is none yet."""
        if self.made is None:
            if capturing(k):
                raise ValueError("StaticCache: expected a step before one is captured: its memory would be the graph's")
            dims, dtype = (k.shape[3], v.shape[3]), self.dtype or k.dtype
            ring = bool(self.kind.window)
            self.made = KVMemory.zeros(self.batch, k.shape[1], self.kind.size, dims, dtype, k.device, ring)
        return self.made


class Layer(CacheLayerMixin):
    """Some neighbouring rows of one layer."""

    is_compileable = False  # generate would compile the model, which gains nothing over a captured step
    supports_early_init = False

    def __init__(self, memory: LayerMemory, rows: Lengths) -> None:
        super().__init__()
        self.memory, self.rows = memory, rows
        self.window, self.is_sliding = memory.kind.window, memory.kind.is_sliding
        self._step = 0  #: the last step of `rows` that this layer has stored

    @property
    def stored(self) -> bool:
        """True when this layer has stored the current step: its next update begins another."""
        return self._step == self.rows.steps or not self.rows.in_step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        made = self.memory.make(key_states, value_states)
        with torch.inference_mode(False):
            self._rows_memory = made.rows(self.rows.first, self.rows.batch)
        self.keys, self.values, self.is_initialized = self._rows_memory.keys, self._rows_memory.values, True

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Tokens before this layer's next update: an int where the host knows it, else the device's, 0-d where the rows
        are equal and `[B, 1]` where not (with which a model cannot make positions: they have to be passed)."""
        rows = self.rows
        ready = self.stored  # else the layers before this one have counted the step's tokens already
        known = rows.known if ready else rows.start
        if known is not None:
            return known
        lengths = (rows.tokens if ready else rows.starts).long()
        return lengths[0] if rows.equal else lengths[:, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What `update` is about to return: keys, and the position of the first."""
        rows, known, before = self.rows, self.rows.known, self.window - 1
        if query_length > 1 and known is not None:
            offset = max(0, known - before) if self.window else 0
            return known + query_length - offset, offset
        if query_length > 1 and self.window:
            return before + query_length, DeviceOffset(rows.tokens, self.window)
        return self.memory.kind.size, DeviceOffset(rows.tokens, self.window)

    def get_max_length(self) -> int:
        return self.window or self.memory.kind.size

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]` behind each row's tokens, and returns the keys and values that
        the mask is for: the whole memory for one query, keys in order for several, from the first query's window on.
        """
        rows = self.rows
        if key_states.shape[0] != rows.batch:
            raise ValueError(f"StaticCache: expected {rows.batch} rows, got {key_states.shape[0]}")
        if key_states.device != rows.tokens.device:
            raise ValueError(f"StaticCache: expected device {rows.tokens.device}, got {key_states.device}")
        new = key_states.shape[2]
        if self.stored:
            self._begin(new)
        elif new != rows.new:
            raise ValueError(f"StaticCache: expected {rows.new} tokens in this step, got {new}")
        self._step = rows.steps
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        memory = self._rows_memory
        k, v = key_states.to(memory.keys.dtype), value_states.to(memory.values.dtype)
        seen = memory.keys, memory.values
        if self.window and new > 1:
            seen = memory.window_and(k, v, rows.starts, rows.start)
        memory.append(k, v, rows)
        if not self.window and new > 1 and rows.start is not None:
            end = rows.start + new
            return memory.keys[:, :, :end], memory.values[:, :, :end]
        return seen

    def _begin(self, new: int) -> None:
        rows, known = self.rows, self.rows.known
        if known is not None and rows.capacity is not None and known + new > rows.capacity:
            raise ValueError(f"the cache is full: {known} tokens of {rows.capacity}, {new} more do not fit")
        rows.begin(new)

    def offload(self) -> None:
        raise ValueError("StaticCache: cannot be offloaded")

    def prefetch(self) -> None:
        raise ValueError("StaticCache: cannot be offloaded")
