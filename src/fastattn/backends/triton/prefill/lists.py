"""The kernels of `block_lists.py` bound to calls of one kind. The Hopper forward uses them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....call import Call, Problem
from ...layout import aligned
from ..arguments import band, broadcast_strides
from ..binaries.launcher import BinaryLauncher, Launch, launcher_of, rooms_of
from ..binaries.triton_kernel import ALIGNMENT, NamedKernel
from ..launcher import Launcher, overlaps
from ..program import Named, Program, named
from ..representative import stand_in
from .launch_config import LIST_HEADER

_CLASSIFY = NamedKernel(f"{__package__}.block_states", "classify_kernel")
_LIST = NamedKernel(f"{__package__}.block_lists", "list_kernel")
#: Blocks of keys that one program classifies, of a mask that heads share and of one that they do not. In few programs
#: more of a mask lies side by side in memory; a shared mask is small, and would have too few.
_CLASSIFIED = 1, 4
_LISTED = 32  #: blocks of keys in one step of a program that writes lists


class Lists:
    """The kernels of `block_lists.py` bound to one problem and one set of strides."""

    __slots__ = ("_classify", "_list", "_lists", "_states", "entries", "key_blocks", "row_blocks", "size", "strides")

    def __init__(self, p: Problem, call: Call, block_m: int, block_n: int) -> None:
        assert call.mask is not None
        key_blocks = -(-p.kv_len // block_n)
        rows = p.mask_shape[2] > 1
        shared = not (rows or p.banded or p.q_lengths)  # one list for all blocks of rows
        row_blocks = 1 if shared else -(-p.q_len // block_m)
        batch = p.batch if p.mask_shape[0] > 1 or p.q_lengths or p.kv_lengths else 1
        heads = p.mask_shape[1]
        entries = batch * heads * row_blocks
        length = key_blocks + LIST_HEADER
        steps = heads * row_blocks * length, row_blocks * length, length
        sizes = batch, heads, row_blocks
        #: Of one list's batch entry, head and block of rows.
        self.strides = tuple(step if count > 1 else 0 for step, count in zip(steps, sizes, strict=True))
        #: Of what is listed: batch entries and heads, and blocks of rows and of keys.
        self.entries, self.row_blocks, self.key_blocks = (batch, heads), row_blocks, key_blocks
        self._lists = -(-4 * entries * length // 16) * 16
        self._states = -(-entries * key_blocks // 16) * 16 if rows else 0
        self.size = self._lists + self._states  #: bytes of the memory that it fills
        counts = heads, row_blocks, p.q_len, p.kv_len, *band(p)
        device, capability = call.q.device, p.capability
        unit, strides, adjacent = mask_layout(call.mask)
        pdl = overlaps(capability)
        options = {"launch_pdl": True} if pdl else {}
        constants = block_m, block_n, unit, adjacent, _LISTED, shared, pdl
        warps = 1 if rows else 4
        integers = (*strides, *counts)
        self._list = launcher_of(_LIST, (entries,), device, capability, integers, constants, num_warps=warps, **options)
        unit, piece, strides, adjacent = rows_layout(call.mask)
        blocks = _CLASSIFIED[heads > 1]
        grid = (entries * -(-key_blocks // blocks),)
        #: Of masks that begin at multiples of 16 bytes, and of others.
        self._classify = tuple(
            launcher_of(
                _CLASSIFY,
                grid,
                device,
                capability,
                (*strides, *counts),
                (block_m, block_n, unit, piece, adjacent, aligned and adjacent and unit > 1, blocks, pdl),
                num_warps=4,
                **options,
            )
            for aligned in (True, False)
        )

    def launches(self, call: Call) -> list[Launch]:
        """What a call launches."""
        memory, lists = stand_in(torch.uint8), stand_in(torch.int32)
        states, lengths = memory if self._states else None, (call.q_lengths, call.kv_lengths)
        found: list[Launch] = [(self._list, (call.mask, states, lists, *lengths), ())]
        return [*found, (self._classifier(call), (call.mask, memory, *lengths), ())] if self._states else found

    def _classifier(self, call: Call) -> BinaryLauncher | Launcher:
        assert call.mask is not None
        return self._classify[call.mask.data_ptr() % ALIGNMENT > 0]

    def states(self, memory: Tensor) -> Tensor:
        """Where a mask with rows is classified: uint8 [batch, heads, row blocks, key blocks]."""
        return memory[self._lists : self.size]

    def __call__(self, call: Call, memory: Tensor) -> Tensor:
        """memory: at least `size` bytes, uint8, its address a multiple of 16."""
        for launcher, tensors, floats in self.in_order(call, memory):
            launcher(tensors, floats)
        return memory[: self._lists].view(torch.int32)

    def in_order(self, call: Call, memory: Any) -> list[Launch]:
        """See `Bounds.in_order`."""
        lists, lengths = memory[: self._lists].view(torch.int32), (call.q_lengths, call.kv_lengths)
        states = self.states(memory) if self._states else None
        found: list[Launch] = []
        if states is not None:
            found.append((self._classifier(call), (call.mask, states, *lengths), ()))
        return [*found, (self._list, (call.mask, states, lists, *lengths), ())]

    def add_to(self, program: Program, call: Call) -> bool:
        """See `Bounds.add_to`."""
        if not aligned(*[x for x in (call.mask, call.q_lengths, call.kv_lengths) if x is not None]):
            return False
        rooms = rooms_of(self.in_order(call, torch.empty(self.size, dtype=torch.uint8, device="meta")))
        if rooms is None:
            return False
        program.add_all(rooms, self.in_order(named(call), Named("memory")), aligned=True)
        return True


def mask_layout(mask: Tensor | None) -> tuple[int, tuple[int, ...], bool]:
    """Elements per unit of a mask's strides and of its keys, the strides (0 along dims that are broadcast; the last one
    in elements of a unit, too), and whether neighbouring keys are neighbours in memory."""
    strides = broadcast_strides(mask, 4)
    if mask is None:
        return 1, strides, True
    if strides[3] != 1:
        return 1, strides, False
    unit = max(1, 16 // mask.element_size())
    if any(number % unit for number in (mask.shape[3], *strides[:3])):
        unit = 1
    return unit, (*(stride // unit for stride in strides[:3]), 1), True


def rows_layout(mask: Tensor) -> tuple[int, int, tuple[int, ...], bool]:
    """As `mask_layout`, but of a mask whose rows begin at multiples of 16 bytes the unit is that, however long they
    are. After the unit: how many keys may be loaded together past the last one."""
    piece, strides, adjacent = mask_layout(mask)
    unit = max(1, ALIGNMENT // mask.element_size())
    apart = broadcast_strides(mask, 4)[:3]
    if not adjacent or any(stride % unit for stride in apart):
        return piece, piece, strides, adjacent
    return unit, piece, (*(stride // unit for stride in apart), 1), adjacent
