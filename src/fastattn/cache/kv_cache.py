"""`KVCache`: the memory of all layers, the lengths of the rows, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import debug
from ..api import scaled_dot_product_attention
from ..common.checks import check_count, check_device, check_tensor, is_count
from ..masks import Intervals
from ..validation import FLOATING, check_lengths
from .lengths import Lengths, capturing
from .memory import KVMemory

GROWTH = 256  #: tokens by which a cache without a fixed capacity grows


class KVCache:
    """Keys and values of a model's layers for a batch of sequences, their lengths on the device.

    One step of generation, or one chunk of a prompt:

        positions = cache.step(tokens)                 # once: `tokens` new tokens for every row
        out = cache.attend(layer, q, k, v)             # in each layer: stores k and v, attends over all tokens so far

    The memory of a layer is `[B, Hkv, C, D]`: the keys of one head lie together, so a decode kernel reads them end to
    end, and cuDNN takes the filled part as a slice, without a copy. Lengths are read on the device alone, so one CUDA
    graph of a step serves every length: rows of 100 tokens in a cache of 8192 cost what 100 tokens cost. Memory past a
    row's length affects no output.

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
        #: Layers that all keep windows have room for any number of tokens.
        self._unbounded = all(window is not None for window in listed)
        self._lengths = Lengths(batch, None if self._unbounded else self._capacity, self.device)
        dims = head_dim, self.value_dim
        self._memory = [
            KVMemory.zeros(batch, kv_heads, window or self._capacity, dims, dtype, self.device, window is not None)
            for window in listed
        ]

    @property
    def lengths(self) -> Tensor:
        """int32 `[B]` on the device: tokens of each row, those of the current step included."""
        return self._lengths.tokens

    @property
    def keys(self) -> list[Tensor]:
        """`[B, Hkv, C, D]` of each layer."""
        return [memory.keys for memory in self._memory]

    @property
    def values(self) -> list[Tensor]:
        """`[B, Hkv, C, Dv]` of each layer."""
        return [memory.values for memory in self._memory]

    @property
    def batch(self) -> int:
        """Rows."""
        return self._lengths.batch

    @property
    def capacity(self) -> int:
        """Tokens that a row of a layer without a window has room for, now."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(memory.nbytes for memory in self._memory)

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
        lengths = self._lengths
        known = lengths.agreed if counts is None else None
        if self._fixed and not self._unbounded and known is not None and known + tokens > self._capacity:
            raise ValueError(f"tokens: the cache is full: {known} tokens of {self._capacity}, {tokens} more do not fit")
        if not self._fixed and lengths.bound + tokens > self._capacity:
            self._grow(lengths.bound + tokens)
        if debug.ENABLED and not self._unbounded:
            longest = int((self.lengths + (tokens if counts is None else counts)).max())
            if longest > self._capacity:
                raise ValueError(f"tokens: a row of {longest} tokens in a cache of {self._capacity}")
        lengths.begin(tokens, counts)
        return lengths.starts[:, None] + torch.arange(tokens, device=self.device)

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

        q: `[B, Hq, S, D]`; k, v: `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`; S as passed to `step`. scale, sinks, softcap,
        backend: as in `scaled_dot_product_attention`. Returns `[B, Hq, S, Dv]`; 0 for tokens that a row did not get.
        """
        if not self._fit(layer, q, k, v):
            self._check(layer, q, k, v)
        options: dict[str, Any] = {"scale": scale, "sinks": sinks, "softcap": softcap, "backend": backend}
        lengths, memory, window = self._lengths, self._memory[layer], self.windows[layer]
        q_lengths = lengths.counts if lengths.ragged else None
        if window is not None and lengths.new > 1:
            keys, values = memory.window_and(k, v, lengths.starts)
            memory.append(k, v, lengths)
            out = scaled_dot_product_attention(q, keys, values, mask=self._window_intervals(window), **options)
            assert isinstance(out, Tensor)
            return out
        memory.append(k, v, lengths)
        keys, values = memory.keys, memory.values
        if window is not None:  # one query sees all that the ring holds
            options |= {"kv_lengths": self.lengths.clamp(max=window), "q_lengths": q_lengths}
        elif lengths.start is not None and not lengths.ragged and lengths.new > 1:
            # The host knows the lengths: a slice needs no clearing of the gaps that lengths on the device leave.
            end = lengths.start + lengths.new
            keys, values = keys[:, :, :end], values[:, :, :end]
            options["mask"] = "causal"
        else:
            options |= {"mask": "causal", "kv_lengths": self.lengths, "q_lengths": q_lengths}
        out = scaled_dot_product_attention(q, keys, values, **options)
        assert isinstance(out, Tensor)
        return out

    def reset(self, rows: Tensor | None = None) -> None:
        """Empties the cache, or some of its rows, for new sequences.

        rows: int64 or int32 indices `[N]`, each of 0..B-1, in any order; or bool `[B]`. On the CPU or on the cache's
            device; there they are not read on the host, and those that are no row's do nothing (FASTATTN_DEBUG=1
            raises, as on the CPU).
        """
        if rows is None:
            self._lengths.empty()
            return
        check_tensor("rows", rows)
        if rows.dtype == torch.bool and rows.shape == self.lengths.shape:
            self._check_device(rows)
            chosen = rows.to(self.device)
        else:
            rows = self._check_rows(rows, f", or bool [{self.batch}]")
            chosen = (rows[:, None] == torch.arange(self.batch, device=self.device)).any(0)
        self._lengths.empty(chosen)

    def reorder(self, rows: Tensor) -> None:
        """Replaces row i by row `rows[i]`: for beams that swap, rows that are dropped or doubled.

        rows: int64 or int32 `[N]`, each of 0..B-1, as often as wanted; the batch has N rows then, in new memory unless
            N == B. On the CPU or on the cache's device; there they are not read on the host, and clamped
            (FASTATTN_DEBUG=1 raises, as on the CPU).
        """
        rows = self._check_rows(rows).clamp(0, self.batch - 1)
        for memory in self._memory:
            memory.reorder(rows)
        self._lengths.reorder(rows)

    def add_rows(self, count: int) -> None:
        """Appends `count` empty rows."""
        check_count("count", count)
        for memory in self._memory:
            memory.add_rows(count)
        self._lengths.add_rows(count)

    def _grow(self, tokens: int) -> None:
        if capturing(self.lengths):
            raise ValueError("tokens: the cache has to grow, which cannot be captured: give it a fixed capacity")
        self._capacity = -(-tokens // GROWTH) * GROWTH
        if not self._unbounded:
            self._lengths.capacity = self._capacity
        for memory in self._memory:
            if not memory.ring:
                memory.grow(self._capacity)

    def _window_intervals(self, window: int) -> Intervals:
        """What each query of a step sees of the window before it and the step's tokens (`KVMemory.window_and`)."""
        lengths, before = self._lengths, window - 1
        i = torch.arange(lengths.new, dtype=torch.int32, device=self.device)[None]
        lo = torch.maximum(i, before - lengths.starts[:, None])
        hi = torch.where(i < lengths.counts[:, None], i + window, 0)
        return Intervals(lo, hi)

    def _check_rows(self, rows: Tensor, also: str = "") -> Tensor:
        """Indices of rows, on the cache's device. also: what else the message allows."""
        check_tensor("rows", rows)
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows: expected int64 or int32 [rows]{also}, got {rows.dtype} {list(rows.shape)}")
        self._check_device(rows)
        if rows.numel() and (rows.device.type == "cpu" or debug.ENABLED):
            least, most = (int(x) for x in rows.aminmax())
            if least < 0 or most >= self.batch:
                raise ValueError(f"rows: expected indices in 0..{self.batch - 1}, got {least}..{most}")
        return rows.to(self.device)

    def _check_device(self, rows: Tensor) -> None:
        if rows.device.type != "cpu" and rows.device != self.lengths.device:
            raise ValueError(f"rows: expected device cpu, or {self.lengths.device} as of the cache, got {rows.device}")

    def _fit(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether all is as `_check` wants it, found quicker for the usual types."""
        new, device = self._lengths.new, self._lengths.tokens.device
        return (
            type(layer) is int
            and 0 <= layer < self.layers
            and all([type(x) is Tensor and not x.is_nested and x.layout is torch.strided for x in (q, k, v)])
            and q.dim() == 4
            and (q.shape[0], *q.shape[2:]) == (self.batch, new, self.head_dim)
            and k.shape == (self.batch, self.kv_heads, new, self.head_dim)
            and v.shape == (self.batch, self.kv_heads, new, self.value_dim)
            and q.device == k.device == v.device == device
        )

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise ValueError(f"layer: expected an int in 0..{self.layers - 1}, got {layer!r}")
        new = self._lengths.new
        expected = {
            "q": (q, (self.batch, None, new, self.head_dim)),
            "k": (k, (self.batch, self.kv_heads, new, self.head_dim)),
            "v": (v, (self.batch, self.kv_heads, new, self.value_dim)),
        }
        for name, (x, shape) in expected.items():
            check_tensor(name, x)
            fits = x.dim() == 4 and all(n in (None, size) for n, size in zip(shape, x.shape, strict=True))
            if not fits:
                sizes = ", ".join("Hq" if n is None else str(n) for n in shape)
                raise ValueError(f"{name}: expected [{sizes}] for this step, got {list(x.shape)}")
            if x.device != self.lengths.device:
                raise ValueError(f"{name}: expected device {self.lengths.device} as of the cache, got {x.device}")
