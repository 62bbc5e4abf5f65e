"""The kernel for many queries bound to one kind of call: what is launched, and what has to be copied to be read."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import Output
from ...scratch import scratch
from ..arguments import band, broadcast_strides, same_strides, strides_in_units
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import BinaryLauncher, launcher_of, prepare
from ..binaries.launcher import Launch as Prepared
from ..binding import TILE, WithCopies, WithSegments, readable, tf32_is_allowed, with_intervals
from ..bounds import Bounds
from ..representative import representative, stand_in
from ..tile_parts import parts
from .block_lists import HEADER, classify_kernel, list_kernel
from .kernel import forward_kernel
from .launch_config import Launch, by_head, choose, listed

_LOG2_E = math.log2(math.e)
_CLASSIFIED = 4  #: blocks of keys that one program classifies
_FLOATS = (1.0, 1.0)  #: stand for the kernel's floats where only binaries are asked for
_LISTED = 32  #: blocks of keys in one step of a program that writes lists


def bind(problem: Problem, call: Call, launch: Launch | None = None) -> Kernel:
    """See `Backend.bind`. launch: how, if not as `choose` says."""
    if call.segments is not None:
        return WithSegments(problem, call, partial(bind, launch=launch))
    found, p = readable(problem, call)
    kernel = PrefillKernel(p, found, launch or choose(p))
    return kernel if found is call else WithCopies(problem, kernel)


def binaries(problem: Problem) -> list[FlagSet]:
    """See `Compiled.binaries`."""
    call = representative(problem)
    before: list[Prepared] = []
    if call.segments is not None:
        before = Bounds(problem, call, TILE).launches(call)
        problem = with_intervals(problem)
        call = representative(problem)
    launches = PrefillKernel(problem, call, choose(problem)).launches(call) + before
    return [x.flags(tensors, floats) for x, tensors, floats in launches if isinstance(x, BinaryLauncher)]


class PrefillKernel(ForwardOnly):
    """The kernel, and those that list its blocks of keys, bound to one problem and one set of strides."""

    __slots__ = ("_forward", "_lists", "_lse", "_output", "_problem")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        self._problem = p
        self._output = Output(p, call.q)
        self._lse = (p.batch, p.q_heads, p.q_len) if p.return_lse else None
        self._lists = Lists(p, call, launch) if listed(p, launch) else None
        integers, constants = _arguments(p, call, launch, self._lists.strides if self._lists else (0, 0, 0))
        grid = (-(-p.q_len // launch.block_m) * p.batch * p.q_heads,)
        self._forward = {
            (in_k, precision): launcher_of(
                forward_kernel,
                grid,
                call.q.device,
                p.capability,
                integers,
                (*constants, in_k, by_head(p), precision),
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
            for in_k in ((False, True) if _may_share(p, call) else (False,))
            for precision in _PRECISIONS.get(p.dtype, ("ieee",))
        }
        prepare(self.launches(call, self._in_k(call, precision_of(p))))

    def launches(self, call: Call, in_k: bool = False) -> list[Prepared]:
        """What a call launches, the kernel first. in_k: v lies in k."""
        p = self._problem
        out, lse = stand_in(p.dtype), stand_in(torch.float32) if self._lse else None
        lists = stand_in(torch.int32) if self._lists else None
        launcher = self._forward[in_k, precision_of(p)]
        found: list[Prepared] = [(launcher, _tensors(call, out, lse, lists), _FLOATS)]
        return found + self._lists.launches(call) if self._lists else found

    def _in_k(self, call: Call, precision: str) -> bool:
        return (True, precision) in self._forward and call.v.data_ptr() == call.k.data_ptr()

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q, scale = self._problem, call.q, call.scale
        out = self._output(q)
        lse = torch.empty(self._lse, dtype=torch.float32, device=q.device) if self._lse else None
        lists = self._lists(call, scratch(q.device, self._lists.size)) if self._lists else None
        inner, factor = (scale / p.softcap, p.softcap) if p.softcap else (1.0, scale)
        if p.mask != "additive":
            factor *= _LOG2_E
        precision = precision_of(p)
        self._forward[self._in_k(call, precision), precision](_tensors(call, out, lse, lists), (inner, factor))
        return out, lse


def _tensors(call: Call, out: Tensor, lse: Tensor | None, lists: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernel's tensors."""
    read = call.mask, lists, call.lo, call.hi, call.sinks, call.q_lengths, call.kv_lengths
    return call.q, call.k, call.v, out, lse, *read


class Lists:
    """The kernels of `block_lists.py` bound to one problem and one set of strides."""

    __slots__ = ("_classify", "_list", "_lists", "_states", "entries", "key_blocks", "row_blocks", "size", "strides")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        assert call.mask is not None
        key_blocks = -(-p.kv_len // launch.block_n)
        rows = p.mask_shape[2] > 1
        shared = not (rows or p.banded or p.q_lengths)  # one list for all blocks of rows
        row_blocks = 1 if shared else -(-p.q_len // launch.block_m)
        batch = p.batch if p.mask_shape[0] > 1 or p.q_lengths or p.kv_lengths else 1
        heads = p.mask_shape[1]
        entries = batch * heads * row_blocks
        length = key_blocks + HEADER.value
        steps = heads * row_blocks * length, row_blocks * length, length
        counts = batch, heads, row_blocks
        #: Of one list's batch entry, head and block of rows.
        self.strides = tuple(step if count > 1 else 0 for step, count in zip(steps, counts, strict=True))
        #: Of what is listed: batch entries and heads, and blocks of rows and of keys.
        self.entries, self.row_blocks, self.key_blocks = (batch, heads), row_blocks, key_blocks
        self._lists = -(-4 * entries * length // 16) * 16
        self._states = -(-entries * key_blocks // 16) * 16 if rows else 0
        self.size = self._lists + self._states  #: bytes of the memory that it fills
        unit, strides, adjacent = mask_layout(call.mask)
        integers = (*strides, heads, row_blocks, p.q_len, p.kv_len, *band(p))
        constants = launch.block_m, launch.block_n, unit, adjacent
        where = call.q.device, p.capability
        grid = entries, -(-key_blocks // _CLASSIFIED)
        self._classify = launcher_of(classify_kernel, grid, *where, integers, (*constants, _CLASSIFIED), num_warps=4)
        self._list = launcher_of(list_kernel, (entries,), *where, integers, (*constants, _LISTED, shared), num_warps=4)

    def launches(self, call: Call) -> list[Prepared]:
        """What a call launches."""
        memory, lists = stand_in(torch.uint8), stand_in(torch.int32)
        states, lengths = memory if self._states else None, (call.q_lengths, call.kv_lengths)
        found: list[Prepared] = [(self._list, (call.mask, states, lists, *lengths), ())]
        return [*found, (self._classify, (call.mask, memory, *lengths), ())] if self._states else found

    def states(self, memory: Tensor) -> Tensor:
        """Where a mask with rows is classified: uint8 [batch, heads, row blocks, key blocks]."""
        return memory[self._lists : self.size]

    def __call__(self, call: Call, memory: Tensor) -> Tensor:
        """memory: at least `size` bytes, uint8, its address a multiple of 16."""
        lists = memory[: self._lists].view(torch.int32)
        states = self.states(memory) if self._states else None
        if states is not None:
            self._classify((call.mask, states, call.q_lengths, call.kv_lengths))
        self._list((call.mask, states, lists, call.q_lengths, call.kv_lengths))
        return lists


def _arguments(
    p: Problem, call: Call, launch: Launch, list_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kernel's integers, and its constants but for the last three."""
    unit, strides = strides_in_units(call)
    mask_unit, mask_strides, adjacent = mask_layout(call.mask)
    integers = (
        *strides,
        *mask_strides,
        *list_strides,
        *broadcast_strides(call.lo, 2),
        p.q_heads,
        p.group,
        -(-p.q_len // launch.block_m),
        p.q_len,
        p.kv_len,
        *band(p),
    )
    blocks = (launch.block_m, launch.block_n, *parts(p.head_dim), *parts(p.value_dim))
    mask_rows = p.dense_mask and p.mask_shape[2] > 1
    biased = p.mask == "additive"
    gaps = p.mask == "intervals" and p.mask_shape[1] > 1
    return integers, (
        p.head_dim,
        p.value_dim,
        *blocks,
        unit,
        mask_unit,
        mask_rows,
        adjacent,
        biased,
        p.softcap != 0,
        gaps,
    )


def mask_layout(mask: Tensor | None) -> tuple[int, tuple[int, ...], bool]:
    """Elements per unit of a mask's strides, the strides (0 along dims that are broadcast; the last one in elements of
    a unit, too), and whether neighbouring keys are neighbours in memory."""
    strides = broadcast_strides(mask, 4)
    if mask is None:
        return 1, strides, True
    if strides[3] != 1:
        return 1, strides, False
    unit = max(1, 16 // mask.element_size())
    if any(stride % unit for stride in strides[:3]):
        unit = 1
    return unit, (*(stride // unit for stride in strides[:3]), 1), True


def _may_share(p: Problem, call: Call) -> bool:
    """Whether v may be the first columns of k (as in MLA with absorbed projections), read once: as far as shapes and
    strides tell."""
    (head, _), (value, rest) = parts(p.head_dim), parts(p.value_dim)
    same = same_strides(call.k, call.v) and p.value_dim <= p.head_dim
    return same and head == value == p.value_dim and not rest


_PRECISIONS = {torch.float32: ("ieee", "tf32x3", "tf32")}


def precision_of(p: Problem) -> str:
    """Of float32 products. Three products of TF32 are as exact as float32 is; TF32 alone where the user let torch's own
    products use it. The interpreter has but one way."""
    if p.dtype != torch.float32 or p.device != "cuda":
        return "ieee"
    return "tf32" if tf32_is_allowed() else "tf32x3"
