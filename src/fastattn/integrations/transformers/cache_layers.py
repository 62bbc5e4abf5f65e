"""The layers of `cache.StaticCache`, and what they share: the rows' lengths and the step that they are in.

transformers asks a cache twice in each forward: for the sizes of the mask, once per layer type, and then, in every
layer, to store the new keys and values. Both are answered from lengths on the device, so that a captured step is right
for every length. What the host happens to know as well serves steps of many queries, whose kernels gain by it.

A layer with a window (or a chunk) keeps only so many tokens, as a ring: token t lies at t % window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._compat.hf import CacheLayerMixin
from ...backends.triton.launcher import native
from .cache_positions import Slots
from .lazy_mask import capturing


class Kind(NamedTuple):
    """What a layer keeps."""

    size: int  #: tokens
    window: int  #: the size again, if that is less than the capacity, 0 else
    is_sliding: bool  #: transformers makes the masks of windows and chunks from the first layer that is


class Memory:
    """Keys and values of one layer, all rows, `[B, Hkv, C, D]`; made when the first are known."""

    def __init__(self, kind: Kind, batch: int, dtype: torch.dtype | None) -> None:
        self.kind, self.batch, self.dtype = kind, batch, dtype
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def make(self, k: Tensor, v: Tensor) -> None:
        if capturing(k):
            raise ValueError("StaticCache: expected a step before one is captured: its memory would be the graph's")
        shapes = ((self.batch, x.shape[1], self.kind.size, x.shape[3]) for x in (k, v))
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(shape, dtype=self.dtype or k.dtype, device=k.device) for shape in shapes
            )


class Host:
    """What the host knows of the lengths of all rows."""

    def __init__(self, batch: int) -> None:
        self.lengths: list[int | None] = [0] * batch
        #: rows whose steps are replayed behind its back: it knows nothing of them again
        self.captured: set[int] = set()
        self.together = True  #: every row has gone through the same


class Rows:
    """Some neighbouring rows of a cache: how many tokens they hold, and the step that they are in."""

    def __init__(self, lengths: Tensor, host: Host, capacity: int, first: int) -> None:
        self.lengths = lengths  #: int32 [B]: tokens of each row
        self.host, self.capacity, self.first = host, capacity, first
        self.layers: list[Layer] = []
        self.starts = self.ends = self.counts = lengths  #: int32 [B]: before and after the step, and what it adds
        self.start: int | None = None  #: `starts`, where the host may rely on it
        self.new = 0  #: tokens of the step

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def all_rows(self) -> bool:
        return self.batch == len(self.host.lengths)

    @property
    def alike(self) -> bool:
        """True when all are known to have the same length, whatever it is."""
        return self.batch == 1 or self.host.together

    @property
    def known(self) -> int | None:
        """Tokens of every one of these rows, None where only the device knows, or where they differ."""
        found = set(self.host.lengths[self.first : self.first + self.batch])
        return None if len(found) > 1 or capturing(self.lengths) else found.pop()

    def know(self, lengths: list[int | None]) -> None:
        for row, length in enumerate(lengths, self.first):
            self.host.lengths[row] = None if row in self.host.captured else length

    def begin(self, new: int) -> None:
        """A step of so many tokens in every row: from now on they count."""
        start = self.known
        if start is not None and start + new > self.capacity:
            raise ValueError(f"the cache is full: {start} tokens of {self.capacity}, {new} more do not fit")
        if capturing(self.lengths):
            self.host.captured.update(range(self.first, self.first + self.batch))
        self.start, self.new = start, new
        with torch.no_grad():
            self.starts = self.lengths.clone()
            self.counts = (self.capacity - self.starts).clamp_(max=new)  # what is too much is dropped
            self.ends = self.starts + self.counts
            self.lengths.copy_(self.ends)
        before = self.host.lengths[self.first : self.first + self.batch]
        self.know([None if n is None else min(n + new, self.capacity) for n in before])
        self.host.together &= self.all_rows
        for layer in self.layers:
            layer.done = False

    def empty(self) -> None:
        self.lengths.zero_()
        self.know([0] * self.batch)
        self.host.together = self.all_rows
        for layer in self.layers:
            layer.done = True

    def part(self, first: int, batch: int) -> Rows:
        with torch.inference_mode(False):
            lengths = self.lengths[first : first + batch]
        return Rows(lengths, self.host, self.capacity, self.first + first)


class Layer(CacheLayerMixin):
    """One layer's part of some rows."""

    is_compileable = False  # generate would compile the model, which gains nothing over a captured step
    supports_early_init = False

    def __init__(self, memory: Memory, rows: Rows) -> None:
        super().__init__()
        self.memory, self.rows = memory, rows
        self.window, self.is_sliding = memory.kind.window, memory.kind.is_sliding
        self.done = True  #: the next update begins a step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.memory.make(key_states, value_states)

    def parts(self) -> tuple[Tensor, ...]:
        """These rows' keys and values, if there are any yet."""
        rows = slice(self.rows.first, self.rows.first + self.rows.batch)
        memory = self.memory
        return () if memory.keys is None or memory.values is None else (memory.keys[rows], memory.values[rows])

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Tokens before this layer's next update: an int where the host knows it, else the device's, 0-d where the rows
        are alike and `[B, 1]` where not (with which a model cannot make positions: they have to be passed)."""
        rows = self.rows
        ready = self.done  # else the layers before this one have counted the step's tokens already
        known = rows.known if ready else rows.start
        if known is not None:
            return known
        lengths = (rows.lengths if ready else rows.starts).long()
        return lengths[0] if rows.alike else lengths[:, None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What `update` is about to return: keys, and the position of the first."""
        rows, known, before = self.rows, self.rows.known, self.window - 1
        if query_length > 1 and known is not None:
            offset = max(0, known - before) if self.window else 0
            return known + query_length - offset, offset
        if query_length > 1 and self.window:
            return before + query_length, Slots(rows.lengths, self.window)
        return self.memory.kind.size, Slots(rows.lengths, self.window)

    def get_max_length(self) -> int:
        return self.window or self.rows.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]` where the lengths say, and returns what the queries may see:
        one query the whole memory, several queries the keys in order, from before the window of the first one on.
        """
        rows = self.rows
        if key_states.shape[0] != rows.batch:
            raise ValueError(f"StaticCache: expected {rows.batch} rows, got {key_states.shape[0]}")
        if key_states.device != rows.lengths.device:
            raise ValueError(f"StaticCache: expected device {rows.lengths.device}, got {key_states.device}")
        new = key_states.shape[2]
        if self.done:
            rows.begin(new)
        elif new != rows.new:
            raise ValueError(f"StaticCache: expected {rows.new} tokens in this step, got {new}")
        self.done = True
        if not self.parts():
            self.lazy_initialization(key_states, value_states)
        keys, values = self.parts()
        self.keys, self.values, self.is_initialized = keys, values, True
        k, v = key_states.to(keys.dtype), value_states.to(values.dtype)
        seen = (self._joined(keys, k), self._joined(values, v)) if self.window and new > 1 else (keys, values)
        with torch.no_grad():
            _store(keys, values, k, v, rows.ends, rows.counts, ring=bool(self.window))
        if not self.window and new > 1 and rows.start is not None:
            end = rows.start + new
            return keys[:, :, :end], values[:, :, :end]
        return seen

    def _joined(self, memory: Tensor, new: Tensor) -> Tensor:
        """The tokens of the window before the step, in order, and those of the step: a ring has no room for both."""
        rows, window = self.rows, self.window
        if rows.start is None:
            token = rows.starts[:, None] + torch.arange(1 - window, 0, dtype=torch.int32, device=memory.device)
            place = token.remainder(window).long()[:, None, :, None]
            return torch.cat([memory.gather(2, place.expand(-1, memory.shape[1], -1, memory.shape[3])), new], 2)
        before = min(rows.start, window - 1)
        first = (rows.start - before) % window
        wrapped = max(0, first + before - window)
        parts = [memory[:, :, first : first + before - wrapped], memory[:, :, :wrapped], new]
        parts = [x for x in parts if x.shape[2]]
        return torch.cat(parts, 2) if len(parts) > 1 else new

    def offload(self) -> None:
        raise ValueError("StaticCache: cannot be offloaded")

    def prefetch(self) -> None:
        raise ValueError("StaticCache: cannot be offloaded")


def _store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, ends: Tensor, counts: Tensor, ring: bool) -> None:
    if keys.is_cuda and native("cuda"):
        from ...cache.append import append

        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        append(keys, values, k, v, ends, counts, ring)
    else:
        from ...cache.host import append_on_the_host

        append_on_the_host(keys, values, k, v, ends, counts, ring)
