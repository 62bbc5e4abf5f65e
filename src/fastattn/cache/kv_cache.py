"""The cache: which memory, which lengths, and the attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import debug
from ..api import scaled_dot_product_attention
from ..backends.triton.launcher import native
from ..common.checks import check_count, check_device, check_tensor, is_count
from ..masks import Intervals
from ..validation import FLOATING, check_lengths

GROWTH = 256  #: tokens by which a cache without a fixed capacity grows


class KVCache:
    """Keys and values of a model's layers for a batch of sequences, their lengths on the device.

    One step of generation, or one chunk of a prompt:

        positions = cache.step(tokens)                 # once: `tokens` new tokens for every row
        out = cache.attend(layer, q, k, v)             # in each layer: stores k and v, attends over all tokens so far

    The memory of a layer is `[B, Hkv, C, D]`: the keys of one head lie together, so a decode kernel reads them end to
    end, and cuDNN takes the filled part as a slice, without a copy. Lengths are read on the device alone, so one CUDA
    graph of a step serves every length: rows of 100 tokens in a cache of 8192 cost what 100 tokens cost. What memory
    past a row's length holds reaches nothing.

    Args:
        layers, batch, kv_heads, head_dim, value_dim: L, B, Hkv, D and Dv (default D).
        capacity: tokens per row. None: the cache grows by 256 as it fills, which needs copies and cannot happen while a
            CUDA graph is captured.
        windows: for each layer the number of last tokens that a query sees, itself included, or None for all; a single
            value stands for all layers. Such a layer keeps only so many tokens, as a ring.
        dtype, device: of keys and values. The device is by default the current GPU where there is one, else the CPU.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        capacity: int | None = None,
        windows: int | Sequence[int | None] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"value_dim": head_dim if value_dim is None else value_dim}
        sizes |= {} if capacity is None else {"capacity": capacity}
        for name, size in sizes.items():
            check_count(name, size)
        if dtype not in FLOATING:
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
        listed = list(windows) if isinstance(windows, Sequence) else [windows] * layers
        if len(listed) != layers:
            raise ValueError(f"windows: expected {layers}, one per layer, got {len(listed)}")
        for window in listed:
            if window is not None and not is_count(window):
                raise ValueError(f"windows: expected ints >= 1 or None, got {window!r}")
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = sizes["value_dim"]
        self.windows: list[int | None] = listed
        self.dtype = dtype
        self.device = check_device(device)
        self._fixed = capacity is not None
        self._capacity = capacity or GROWTH
        #: int32 [B]: tokens of each row, those of the current step included.
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._counts = torch.zeros(batch, dtype=torch.int32, device=self.device)  # new tokens of the current step
        self._new = 0  # of which each row has at most so many
        self._ragged = False  # the rows of the current step have different numbers
        self._bound = 0  #: no row is longer
        self._equal = True  #: every row is exactly so long
        self._captured = False  #: a captured step is replayed without the host: from then on it knows no length
        self.keys = [self._memory(batch, layer, head_dim) for layer in range(layers)]
        self.values = [self._memory(batch, layer, self.value_dim) for layer in range(layers)]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a row of a layer without a window has room for, now."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def step(self, tokens: int, counts: Tensor | None = None) -> Tensor:
        """Begins a step: every row gets `tokens` new tokens, or row b the first `counts[b]` of them.

        tokens: S, at least 1. counts: int32 `[B]` on the cache's device, 0..S (clamped); never read on the host.
        Returns the new tokens' positions, int64 `[B, S]` (those of tokens that a row does not get go on counting).

        Raises ValueError when the host knows that a row would be longer than a fixed capacity. Where only the device
        knows, what is too much is dropped (FASTATTN_DEBUG=1 raises).
        """
        check_count("tokens", tokens)
        if counts is not None:
            check_lengths("counts", counts, self.lengths)
        bound = self._bound + tokens
        unbounded = all(window is not None for window in self.windows)
        if self._fixed and not unbounded and bound > self._capacity and self._equal and counts is None:
            raise ValueError(
                f"tokens: the cache is full: {self._bound} tokens of {self._capacity}, {tokens} more do not fit"
            )
        if not self._fixed and bound > self._capacity:
            self._grow(bound)
        if debug.ENABLED and not unbounded:
            longest = int((self.lengths + (tokens if counts is None else counts)).max())
            if longest > self._capacity:
                raise ValueError(f"tokens: a row of {longest} tokens in a cache of {self._capacity}")
        if counts is None:
            self._counts.fill_(tokens)
        else:
            self._counts.copy_(counts.clamp(0, tokens))
        if not unbounded:
            torch.minimum(self._counts, self._capacity - self.lengths, out=self._counts)
        start = self.lengths.long()
        self.lengths.add_(self._counts)
        self._new = tokens
        self._ragged = counts is not None
        self._equal = self._equal and counts is None
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured = True
        if self._captured:
            self._equal, bound = False, self._capacity
        self._bound = bound if unbounded else min(bound, self._capacity)
        return start[:, None] + torch.arange(tokens, device=self.device)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Stores the keys and values of the step's tokens and attends to all tokens so far, causally.

        q: `[B, Hq, S, D]`; k, v: `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`; S as told to `step`. scale, sinks, softcap,
        backend: as in `scaled_dot_product_attention`. Returns `[B, Hq, S, Dv]`; 0 for tokens that a row did not get.
        """
        self._check(layer, q, k, v)
        options: dict[str, Any] = {"scale": scale, "sinks": sinks, "softcap": softcap, "backend": backend}
        q_lengths = self._counts if self._ragged else None
        window = self.windows[layer]
        if window is not None and self._new > 1:
            k, v, seen = self._window_of(layer, window, k, v)
            out = scaled_dot_product_attention(q, k[0], v[0], mask=seen, **options)
            self._store(layer, k[1], v[1])
        else:
            self._store(layer, k, v)
            keys, values = self.keys[layer], self.values[layer]
            if window is not None:  # one query: what the ring holds is what it sees
                out = scaled_dot_product_attention(
                    q, keys, values, kv_lengths=self.lengths.clamp(max=window), q_lengths=q_lengths, **options
                )
            elif self._equal and self._new > 1:  # the host knows: lengths that are no data need no clearing of gaps
                keys, values = keys[:, :, : self._bound], values[:, :, : self._bound]
                out = scaled_dot_product_attention(q, keys, values, mask="causal", **options)
            else:
                out = scaled_dot_product_attention(
                    q, keys, values, mask="causal", kv_lengths=self.lengths, q_lengths=q_lengths, **options
                )
        assert isinstance(out, Tensor)
        return out

    def reset(self, rows: Tensor | None = None) -> None:
        """Empties the cache, or some of its rows, for new sequences.

        rows: int64 or int32 indices `[N]`, each of 0..B-1, in any order; or bool `[B]`. On the CPU or on the cache's
            device; there they are not read on the host, and those that are no row's do nothing (FASTATTN_DEBUG=1
            raises, as on the CPU).
        """
        if rows is None:
            self.lengths.zero_()
            self._bound, self._equal = 0, not self._captured
            return
        check_tensor("rows", rows)
        if rows.dtype == torch.bool and rows.shape == self.lengths.shape:
            self._check_place(rows)
            chosen = rows.to(self.device)
        else:
            rows = self._check_rows(rows, f", or bool [{self.batch}]")
            chosen = (rows[:, None] == torch.arange(self.batch, device=self.device)).any(0)
        self.lengths.masked_fill_(chosen, 0)
        self._equal = False

    def reorder(self, rows: Tensor) -> None:
        """Makes row i what row `rows[i]` was: beams that swap, rows that are dropped or doubled.

        rows: int64 or int32 `[N]`, each of 0..B-1, as often as wanted; the batch has N rows then, in new memory unless
            N == B. On the CPU or on the cache's device; there they are not read on the host, and clamped
            (FASTATTN_DEBUG=1 raises, as on the CPU).
        """
        rows = self._check_rows(rows).clamp(0, self.batch - 1)
        same = rows.shape[0] == self.batch
        for memory in (self.keys, self.values):
            for layer, old in enumerate(memory):
                new = old.index_select(0, rows)
                memory[layer] = old.copy_(new) if same else new
        lengths, counts = self.lengths.index_select(0, rows), self._counts.index_select(0, rows)
        self.lengths = self.lengths.copy_(lengths) if same else lengths
        self._counts = self._counts.copy_(counts) if same else counts

    def add_rows(self, count: int) -> None:
        """Appends `count` empty rows."""
        check_count("count", count)
        for memory, dim in ((self.keys, self.head_dim), (self.values, self.value_dim)):
            for layer, old in enumerate(memory):
                memory[layer] = torch.cat([old, self._memory(count, layer, dim)])
        more = self.lengths.new_zeros(count)
        self.lengths, self._counts = torch.cat([self.lengths, more]), torch.cat([self._counts, more])
        self._equal = self._equal and self._bound == 0

    def _memory(self, batch: int, layer: int, dim: int) -> Tensor:
        window = self.windows[layer]
        length = self._capacity if window is None else window
        return torch.zeros((batch, self.kv_heads, length, dim), dtype=self.dtype, device=self.device)

    def _grow(self, tokens: int) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("tokens: the cache has to grow, which cannot be captured: give it a fixed capacity")
        old_capacity, self._capacity = self._capacity, -(-tokens // GROWTH) * GROWTH
        for memory, dim in ((self.keys, self.head_dim), (self.values, self.value_dim)):
            for layer, old in enumerate(memory):
                if self.windows[layer] is None:
                    memory[layer] = self._memory(self.batch, layer, dim)
                    memory[layer][:, :, :old_capacity] = old

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        k, v = (x.to(self.dtype) if x.stride(-1) == 1 else x.to(self.dtype).contiguous() for x in (k, v))
        arguments = (self.keys[layer], self.values[layer], k, v, self.lengths, self._counts)
        ring = self.windows[layer] is not None
        if self.device.type == "cuda" and native("cuda"):
            from .append import append

            append(*arguments, ring)
        else:
            from .host import append_on_the_host

            append_on_the_host(*arguments, ring)

    def _window_of(self, layer: int, window: int, k: Tensor, v: Tensor) -> tuple[Any, Any, Intervals]:
        """The window before the step and its tokens, in order: `(joined, new)` for k and v, and what each query sees.

        A ring that holds just a window has no room for the keys of a step's first queries and its last ones at once.
        """
        before = window - 1
        start = self.lengths - self._counts
        joined = []
        if before:
            token = start[:, None] - before + torch.arange(before, dtype=torch.int32, device=self.device)
            place = (token % window).long()[:, None, :, None]
            for x, memory in ((k, self.keys[layer]), (v, self.values[layer])):
                old = memory.gather(2, place.expand(-1, self.kv_heads, -1, memory.shape[3]))
                joined.append(torch.cat([old, x.to(self.dtype)], 2))
        else:
            joined = [k.to(self.dtype), v.to(self.dtype)]
        i = torch.arange(self._new, dtype=torch.int32, device=self.device)[None]
        lo = torch.maximum(i, before - start[:, None])
        hi = torch.where(i < self._counts[:, None], i + window, 0)
        return (joined[0], k), (joined[1], v), Intervals(lo, hi)

    def _check_rows(self, rows: Tensor, also: str = "") -> Tensor:
        """Indices of rows, on the cache's device. also: what else the message allows."""
        check_tensor("rows", rows)
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows: expected int64 or int32 [rows]{also}, got {rows.dtype} {list(rows.shape)}")
        self._check_place(rows)
        if rows.numel() and (rows.device.type == "cpu" or debug.ENABLED):
            least, most = (int(x) for x in rows.aminmax())
            if least < 0 or most >= self.batch:
                raise ValueError(f"rows: expected indices in 0..{self.batch - 1}, got {least}..{most}")
        return rows.to(self.device)

    def _check_place(self, rows: Tensor) -> None:
        if rows.device.type != "cpu" and rows.device != self.lengths.device:
            raise ValueError(f"rows: expected device cpu, or {self.lengths.device} as of the cache, got {rows.device}")

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise ValueError(f"layer: expected an int in 0..{self.layers - 1}, got {layer!r}")
        expected = {
            "q": (q, (self.batch, None, self._new, self.head_dim)),
            "k": (k, (self.batch, self.kv_heads, self._new, self.head_dim)),
            "v": (v, (self.batch, self.kv_heads, self._new, self.value_dim)),
        }
        for name, (x, shape) in expected.items():
            check_tensor(name, x)
            fits = x.dim() == 4 and all(n in (None, size) for n, size in zip(shape, x.shape, strict=True))
            if not fits:
                sizes = ", ".join("Hq" if n is None else str(n) for n in shape)
                raise ValueError(f"{name}: expected [{sizes}] for this step, got {list(x.shape)}")
            if x.device != self.lengths.device:
                raise ValueError(f"{name}: expected device {self.lengths.device} as of the cache, got {x.device}")
