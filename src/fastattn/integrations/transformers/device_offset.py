"""`DeviceOffset`: how lengths on the device travel through transformers, from the cache to the mask function."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceOffset(int):
    """The `kv_offset` of a cache whose lengths only the device knows.

    Why an int that carries a tensor: transformers asks a cache for two ints (`get_mask_sizes`) and passes them to the
    mask function, which gets nothing else of the cache. The offset of the queries may be a tensor, but `kv_offset` may
    not: transformers compares it on the host (to pad block ids, to compare with a chunk), which would wait for the
    device and break a capture. So it is the int 0 to transformers, with the lengths beside it. Any arithmetic gives a
    plain int, therefore it has to arrive unchanged: `kv_cache.StaticCache` checks the installed version and raises
    `Gone` where it does not.

    starts: int32 `[B]`, tokens of each row before the step. window: 0 where the keys are a row's tokens from the first
    on. Else a single query has a ring before it, in which token t lies at t % window, and several queries have the
    window - 1 tokens before the step, followed by the step's.
    """

    starts: Tensor
    window: int

    def __new__(cls, starts: Tensor, window: int) -> DeviceOffset:
        found = super().__new__(cls)
        found.starts, found.window = starts, window
        return found

    def positions(self, queries: int) -> Tensor:
        """Of the queries, int64 `[B, Sq]`."""
        return self.starts.long()[:, None] + torch.arange(queries, device=self.starts.device)

    def first_key(self) -> Tensor:
        """The position of the first key, where several queries see keys in order, int64 `[B, 1]`. Keys at positions
        below 0 are no tokens."""
        starts = self.starts.long()[:, None]
        return starts - (self.window - 1) if self.window else torch.zeros_like(starts)

    def key_positions(self, queries: int, keys: int) -> Tensor:
        """The position of each key, int64 `[B | 1, Skv]`. Keys below 0, or past the last query's, are no tokens."""
        index = torch.arange(keys, device=self.starts.device)[None]
        if queries > 1 or not self.window:
            return index + self.first_key()
        last = self.starts.long()[:, None]
        return last - (last - index).remainder(self.window)
