"""New keys and values into a cache of flash-attn's layout, at places that only the device knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._compat.torch import plain
from ...backends.triton.launcher import native


class Places(NamedTuple):
    """Where the tokens of a step go: token i of row b to position `starts[b] + i` of that row's cache."""

    starts: Tensor  #: int32 [B]
    rows: Tensor | None  #: int32 [B]: the cache's row of each row; None: the same
    table: Tensor | None  #: int32 [B, M]: the pages of each row; None: the cache has none

    def capacity(self, cache: Tensor) -> int:
        """Positions of one row. cache: `[rows, positions, H, D]` or `[pages, page size, H, D]`."""
        return cache.shape[1] * (1 if self.table is None else self.table.shape[1])


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Places) -> None:
    """Stores k, v `[B, S, H, D]`, `[B, S, H, Dv]` in the cache, in place. Tokens beyond its capacity are dropped, and
    so are those of rows or pages that the cache does not have."""
    k, v = k.to(keys.dtype), v.to(values.dtype)
    arguments = (keys, values, k, v, *places)
    if plain(*[x for x in arguments if x is not None]):
        _store(*arguments)
    else:
        torch.ops.fastattn.store_in_cache(*arguments)


def _store(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    rows: Tensor | None,
    table: Tensor | None,
) -> None:
    if native(keys.device.type):
        from .store_kernel import store

        store(keys, values, k, v, starts, rows, table)
    else:
        _store_by_torch(keys, values, k, v, Places(starts, rows, table))


def _store_by_torch(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Places) -> None:
    """For devices without Triton. Waits for the device, if there is one."""
    positions = places.starts.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    there = (positions >= 0) & (positions < places.capacity(keys))
    if places.table is not None:
        page = positions.clamp(0, max(places.capacity(keys) - 1, 0)) // keys.shape[1]
        row = places.table.long().gather(1, page)
    else:
        own = torch.arange(k.shape[0], device=k.device) if places.rows is None else places.rows.long()
        row = own[:, None].expand_as(positions)
    there = there & (row >= 0) & (row < keys.shape[0])
    batch, token = there.nonzero(as_tuple=True)
    row, position = row[batch, token], positions[batch, token] % max(keys.shape[1], 1)
    keys[row, position], values[row, position] = k[batch, token], v[batch, token]


_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(
    "store_in_cache(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor starts, Tensor? rows, Tensor? table)"
    " -> ()"
)
_library.impl("store_in_cache", _store, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::store_in_cache", lambda *arguments: None, lib=_library)
