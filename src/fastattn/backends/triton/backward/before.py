"""What runs before the passes of the backward: which blocks they visit, where that is data."""

from __future__ import annotations

from typing import Any

import torch

from ....call import Call, Problem
from ..arguments import band, broadcast_strides
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import launcher_of
from ..binaries.triton_kernel import NamedKernel
from ..prefill.lists import Lists
from ..representative import stand_in
from . import launch_config
from .launch_config import RANGE_FIELDS, Launch

FILLED = "lists", "key_lists", "ranges"  #: pieces of the memory
_KEY_LIST, _RANGE = (NamedKernel(f"{__package__}.ranges", f"{name}_kernel") for name in ("key_list", "range"))


class Before:
    """Lists of the blocks of a tensor mask, ranges of Intervals."""

    __slots__ = ("_key_lists", "_ranges", "key_list_strides", "key_lists_size", "lists", "ranges_size")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        device, tile = call.q.device, launch.queries
        both = launch_config.listed(p)
        keys = p.masked_keys and p.mask_shape[3] > 1 and p.kv_len > 4 * tile.block_n
        wanted = both or (keys and "q" in p.grads)
        self.lists = Lists(p, call, tile.block_m, tile.block_n) if wanted else None
        self._key_lists = self._ranges = None
        self.key_lists_size = self.ranges_size = 0
        self.key_list_strides = 0, 0
        if both and self.lists is not None:
            assert (launch.keys.block_m, launch.keys.block_n) == (tile.block_m, tile.block_n)
            (batch, heads), row_blocks, key_blocks = self.lists.entries, self.lists.row_blocks, self.lists.key_blocks
            each = key_blocks * (row_blocks + launch_config.KEY_LIST_HEADER)
            self.key_list_strides = heads * each if batch > 1 else 0, each if heads > 1 else 0
            self.key_lists_size = 4 * batch * heads * each
            self._key_lists = launcher_of(
                _KEY_LIST,
                (batch * heads * key_blocks,),
                device,
                p.capability,
                (row_blocks, key_blocks),
                (32,),
                num_warps=1,
            )
        if call.lo is not None:
            key_blocks = -(-p.kv_len // launch.keys.block_n)
            self.ranges_size = 4 * RANGE_FIELDS * p.batch * key_blocks
            self._ranges = launcher_of(
                _RANGE,
                (p.batch * key_blocks,),
                device,
                p.capability,
                (*broadcast_strides(call.lo, 2), key_blocks, p.q_len, p.kv_len, *band(p)),
                (launch.keys.block_n, 1024),
                num_warps=4,
            )

    def launches(self, call: Call) -> list[Prepared]:
        """What `binaries.launcher.prepare` takes."""
        found: list[Prepared] = []
        if self.lists is not None:
            found += self.lists.launches(call)
        if self._key_lists is not None:
            found.append((self._key_lists, (stand_in(torch.uint8), stand_in(torch.int32)), ()))
        if self._ranges is not None:
            lengths = call.q_lengths, call.kv_lengths
            found.append((self._ranges, (stand_in(torch.int32), call.lo, call.hi, *lengths), ()))
        return found

    def in_order(self, call: Call, pieces: dict[str, Any]) -> list[Prepared]:
        """The launches that fill its pieces of the memory, in order. Takes `Named` in the place of tensors, too."""
        found: list[Prepared] = []
        if self.lists is not None:
            found += self.lists.in_order(call, pieces["lists"])
            if self._key_lists is not None:
                found.append((self._key_lists, (self.lists.states(pieces["lists"]), pieces["key_lists"]), ()))
        if self._ranges is not None:
            lengths = call.q_lengths, call.kv_lengths
            found.append((self._ranges, (pieces["ranges"], call.lo, call.hi, *lengths), ()))
        return found
