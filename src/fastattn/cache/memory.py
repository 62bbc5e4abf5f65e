"""Keys and values of one layer: `KVMemory`, shared by all caches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.triton.launcher import native
from .lengths import Lengths


class KVMemory:
    """Keys `[B, Hkv, C, D]` and values `[B, Hkv, C, Dv]` of one layer.

    The keys of one head lie together, so that a decode kernel reads them end to end, and the filled part is a slice.

    ring: the layer keeps the last C tokens alone, and token t lies at t % C; else it lies at t.
    """

    def __init__(self, keys: Tensor, values: Tensor, ring: bool = False) -> None:
        self.keys, self.values, self.ring = keys, values, ring

    @staticmethod
    def zeros(
        batch: int,
        heads: int,
        size: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        ring: bool = False,
    ) -> KVMemory:
        """Memory for `size` tokens, of D and Dv numbers. Zeros, because kernels may multiply what lies past a row's
        length by 0."""
        with torch.inference_mode(False):  # else only inference mode could write into it
            keys, values = (torch.zeros((batch, heads, size, dim), dtype=dtype, device=device) for dim in dims)
        return KVMemory(keys, values, ring)

    @property
    def size(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def rows(self, first: int, count: int) -> KVMemory:
        """A view of the rows `first .. first + count - 1`."""
        end = first + count
        return KVMemory(self.keys[first:end], self.values[first:end], self.ring)

    def append(self, k: Tensor, v: Tensor, lengths: Lengths) -> None:
        """Stores the tokens of the current step, `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, behind each row's tokens."""
        k, v = k.to(self.keys.dtype), v.to(self.values.dtype)
        arguments = (self.keys, self.values, k, v, lengths.tokens, lengths.counts, self.ring)
        if self.keys.is_cuda and native("cuda"):
            from .append import append

            append(*arguments)
        else:
            from .host import append_on_the_host

            append_on_the_host(*arguments)

    def window_and(self, k: Tensor, v: Tensor, starts: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
        """Of a ring: the tokens of the window before the step, in order, followed by the step's. To be called before
        `append`: a ring has no room for the keys of a step's first queries and its last ones at once.

        k, v: of the step, S tokens. starts: int32 `[B]`, tokens of each row before the step. start: the same, where the
        host knows it of all rows.

        Returns keys and values of `min(start, C - 1) + S` tokens. Without `start`, of `C - 1 + S`, of which those
        before a row's first token hold no tokens.
        """
        window, before = self.size, self.size - 1
        k, v = k.to(self.keys.dtype), v.to(self.values.dtype)
        if start is not None:
            return self._joined(self.keys, k, start), self._joined(self.values, v, start)
        if not before:
            return k, v
        token = starts[:, None] + torch.arange(-before, 0, dtype=torch.int32, device=starts.device)
        place = token.remainder(window).long()[:, None, :, None]
        keys, values = (
            torch.cat([memory.gather(2, place.expand(-1, memory.shape[1], -1, memory.shape[3])), new], 2)
            for memory, new in ((self.keys, k), (self.values, v))
        )
        return keys, values

    def _joined(self, memory: Tensor, new: Tensor, start: int) -> Tensor:
        before = min(start, self.size - 1)
        first = (start - before) % self.size
        wrapped = max(0, first + before - self.size)
        parts = [memory[:, :, first : first + before - wrapped], memory[:, :, :wrapped], new]
        parts = [x for x in parts if x.shape[2]]
        return torch.cat(parts, 2) if len(parts) > 1 else new

    def grow(self, size: int) -> None:
        """Makes room for `size` tokens, more than before, by a copy."""
        batch, heads, old, dim = self.keys.shape
        dims = dim, self.values.shape[3]
        new = KVMemory.zeros(batch, heads, size, dims, self.keys.dtype, self.keys.device)
        new.keys[:, :, :old], new.values[:, :, :old] = self.keys, self.values
        self.keys, self.values = new.keys, new.values

    def add_rows(self, count: int) -> None:
        """Appends `count` rows, by a copy."""
        with torch.inference_mode(False), torch.no_grad():
            self.keys, self.values = (
                torch.cat([x, x.new_zeros((count, *x.shape[1:]))]) for x in (self.keys, self.values)
            )

    def reorder(self, rows: Tensor) -> None:
        """Replaces row i by row `rows[i]`: int `[N]` on the device. In place where N is the number of rows."""
        same = rows.shape[0] == self.keys.shape[0]
        with torch.inference_mode(False), torch.no_grad():
            self.keys, self.values = (
                x.copy_(x.index_select(0, rows)) if same else x.index_select(0, rows) for x in (self.keys, self.values)
            )

    def copy_row(self, source: int, target: int) -> None:
        """Copies the row `source` to the row `target`."""
        with torch.no_grad():
            for x in (self.keys, self.values):
                x[target] = x[source]
