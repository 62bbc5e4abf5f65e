"""The kernel for many queries bound to one kind of call: what is launched, and what has to be copied to be read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....call import Call, Gradients, Problem
from ...base import Kernel
from ...layout import Output
from ...scratch import scratch
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import BinaryLauncher, launcher_of, prepare
from ..binaries.launcher import Launch as Prepared
from ..bounds import Bounds
from ..representative import representative
from ..tile_parts import parts
from .block_lists import HEADER, classify_kernel, list_kernel
from .kernel import forward_kernel
from .launch_config import Launch, by_head, choose, listed

_LOG2_E = math.log2(math.e)
_CLASSIFIED = 4  #: blocks of keys that one program classifies
_FLOATS = (1.0, 1.0)  #: stand for the kernel's floats where only binaries are asked for
_TILE = 64  #: rows whose bounds one program finds
_LISTED = 32  #: blocks of keys in one step of a program that writes lists


def bind(problem: Problem, call: Call, launch: Launch | None = None) -> Kernel:
    """See `Backend.bind`. launch: how, if not as `choose` says."""
    if call.segments is not None:
        return _WithSegments(problem, call, launch)
    readable, p = _readable(problem, call)
    return PrefillKernel(p, call, launch or choose(p)) if readable is call else _WithCopies(problem, launch)


def binaries(problem: Problem) -> list[FlagSet]:
    """See `Compiled.binaries`."""
    call = representative(problem)
    before: list[Prepared] = []
    if call.segments is not None:
        before = Bounds(problem, call, _TILE).launches(call)
        shape = problem.batch, problem.q_len
        problem = replace(problem, mask="intervals", mask_shape=shape, left=-1, right=-1)
        call = representative(problem)
    own = PrefillKernel(problem, call, choose(problem)).launches(call)
    launches = [*own, *before]
    return [x.flags(tensors, floats) for x, tensors, floats in launches if isinstance(x, BinaryLauncher)]


class _Forward:
    """A kernel without a backward."""

    __slots__ = ()

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        raise AssertionError("unreachable: `reasons` refuses problems with gradients")


class _WithSegments(_Forward):
    """Calls with segments: a kernel before this one finds the keys that each row sees."""

    __slots__ = ("_bounds", "_kernel", "_shape", "_strides")

    def __init__(self, p: Problem, call: Call, launch: Launch | None) -> None:
        self._bounds = Bounds(p, call, _TILE)
        self._shape = p.batch, p.q_len
        self._strides = self._bounds.tiles * _TILE, 1
        q = replace(p, mask="intervals", mask_shape=self._shape, left=-1, right=-1)
        nothing = torch.empty(self._bounds.size, dtype=torch.uint8, device="meta")
        if call.q.device.type == "cuda":
            prepare(self._bounds.launches(call))
        self._kernel = bind(q, self._with_bounds(call, nothing), launch)

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        memory = scratch(call.q.device, self._bounds.size)
        self._bounds(call, memory)
        return self._kernel.forward(self._with_bounds(call, memory))

    def _with_bounds(self, call: Call, memory: Tensor) -> Call:
        numbers = memory[: self._bounds.size].view(torch.int32)
        lo, hi = (numbers.as_strided(self._shape, self._strides, at) for at in (self._bounds.lo_at, self._bounds.hi_at))
        return call._replace(lo=lo, hi=hi, segments=None, left=-1, right=-1)


class _WithCopies(_Forward):
    """Calls with tensors that the kernel cannot read where they are."""

    __slots__ = ("_launch", "_problem")

    def __init__(self, p: Problem, launch: Launch | None) -> None:
        self._problem = p
        self._launch = launch

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        readable, p = _readable(self._problem, call)
        out, lse = PrefillKernel(p, readable, self._launch or choose(p)).forward(readable)
        return out.to(self._problem.dtype), lse


def _readable(p: Problem, call: Call) -> tuple[Call, Problem]:
    """The call, what the kernel cannot read in place copied; the same object if there is no such thing."""
    if p.device == "cpu" and p.dtype == torch.bfloat16:  # Triton's interpreter multiplies bfloat16's bits as integers
        q, k, v = (x.float() for x in (call.q, call.k, call.v))
        return _readable(replace(p, dtype=torch.float32), call._replace(q=q, k=k, v=v))
    changed: dict[str, Any] = {}
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        if x.stride(3) != 1:
            changed[name] = x.contiguous()
    for name in ("sinks", "q_lengths", "kv_lengths"):
        x = getattr(call, name)
        if x is not None and not x.is_contiguous():
            changed[name] = x.contiguous()
    if call.lo is not None and call.hi is not None and call.lo.stride() != call.hi.stride():
        changed |= {"lo": call.lo.contiguous(), "hi": call.hi.contiguous()}
    return call._replace(**changed) if changed else call, p


class PrefillKernel(_Forward):
    """The kernel, and those that list its blocks of keys, bound to one problem and one set of strides."""

    __slots__ = ("_forward", "_lists", "_lse", "_output", "_problem")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        self._problem = p
        self._output = Output(p, call.q)
        self._lse = (p.batch, p.q_heads, p.q_len) if p.return_lse else None
        self._lists = _Lists(p, call, launch) if listed(p, launch) else None
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
        if call.q.device.type == "cuda":
            prepare(self.launches(call, self._in_k(call)))

    def launches(self, call: Call, in_k: bool = False) -> list[Prepared]:
        """What a call launches, the kernel first. in_k: v lies in k."""
        p = self._problem

        def made(dtype: torch.dtype) -> Tensor:
            return torch.empty(0, dtype=dtype, device="meta")

        out, lse = made(p.dtype), made(torch.float32) if self._lse else None
        lists = made(torch.int32) if self._lists else None
        launcher = self._forward[in_k, _precision(p)]
        found: list[Prepared] = [(launcher, _tensors(call, out, lse, lists), _FLOATS)]
        return found + self._lists.launches(call) if self._lists else found

    def _in_k(self, call: Call) -> bool:
        return (True, _precision(self._problem)) in self._forward and call.v.data_ptr() == call.k.data_ptr()

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q, scale = self._problem, call.q, call.scale
        out = self._output(q)
        lse = torch.empty(self._lse, dtype=torch.float32, device=q.device) if self._lse else None
        lists = self._lists(call) if self._lists else None
        inner, factor = (scale / p.softcap, p.softcap) if p.softcap else (1.0, scale)
        if p.mask != "additive":
            factor *= _LOG2_E
        self._forward[self._in_k(call), _precision(p)](_tensors(call, out, lse, lists), (inner, factor))
        return out, lse


def _tensors(call: Call, out: Tensor, lse: Tensor | None, lists: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernel's tensors."""
    read = call.mask, lists, call.lo, call.hi, call.sinks, call.q_lengths, call.kv_lengths
    return call.q, call.k, call.v, out, lse, *read


class _Lists:
    """The kernels of `block_lists.py` bound to one problem and one set of strides."""

    __slots__ = ("_classify", "_list", "_size", "_states", "strides")

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
        self._size = 4 * entries * length
        self._states = entries * key_blocks if rows else 0
        unit, strides, adjacent = _mask_layout(p, call.mask)
        integers = (*strides, heads, row_blocks, p.q_len, p.kv_len, *_band(p))
        constants = launch.block_m, launch.block_n, unit, adjacent
        where = call.q.device, p.capability
        grid = entries, -(-key_blocks // _CLASSIFIED)
        self._classify = launcher_of(classify_kernel, grid, *where, integers, (*constants, _CLASSIFIED), num_warps=4)
        self._list = launcher_of(list_kernel, (entries,), *where, integers, (*constants, _LISTED, shared), num_warps=4)

    def launches(self, call: Call) -> list[Prepared]:
        """What a call launches."""
        memory = torch.empty(0, dtype=torch.uint8, device="meta")
        lists = torch.empty(0, dtype=torch.int32, device="meta")
        states, lengths = memory if self._states else None, (call.q_lengths, call.kv_lengths)
        found: list[Prepared] = [(self._list, (call.mask, states, lists, *lengths), ())]
        return [*found, (self._classify, (call.mask, memory, *lengths), ())] if self._states else found

    def __call__(self, call: Call) -> Tensor:
        memory = scratch(call.q.device, self._size + self._states)
        lists = memory[: self._size].view(torch.int32)
        states = memory[self._size :] if self._states else None
        if states is not None:
            self._classify((call.mask, states, call.q_lengths, call.kv_lengths))
        self._list((call.mask, states, lists, call.q_lengths, call.kv_lengths))
        return lists


def _arguments(
    p: Problem, call: Call, launch: Launch, list_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kernel's integers, and its constants but for the last three."""
    flat = [stride for x in (call.q, call.k, call.v) for stride in x.stride()[:3]]
    # A stride known to be a multiple of 8 lets 16 bytes be loaded at once.
    unit = 1 if any(stride % 8 for stride in flat) else 8
    mask_unit, mask_strides, adjacent = _mask_layout(p, call.mask)
    interval_strides: tuple[int, ...] = (0, 0)
    if call.lo is not None:
        interval_strides = tuple(s if n > 1 else 0 for n, s in zip(call.lo.shape, call.lo.stride(), strict=True))
    integers = (
        *(stride // unit for stride in flat),
        *mask_strides,
        *list_strides,
        *interval_strides,
        p.q_heads,
        p.group,
        -(-p.q_len // launch.block_m),
        p.q_len,
        p.kv_len,
        *_band(p),
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


def _band(p: Problem) -> tuple[int, int]:
    """left and right for the kernels, in which an open side is as wide as all tokens."""
    far = p.q_len + p.kv_len
    return tuple(far if side < 0 else min(side, far) for side in (p.left, p.right))  # type: ignore[return-value]


def _mask_layout(p: Problem, mask: Tensor | None) -> tuple[int, tuple[int, ...], bool]:
    """Elements per unit of a mask's strides, the strides (0 along dims that are broadcast; the last one in elements of
    a unit, too), and whether neighbouring keys are neighbours in memory."""
    if mask is None:
        return 1, (0, 0, 0, 0), True
    strides = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    if strides[3] != 1:
        return 1, tuple(strides), False
    unit = max(1, 16 // mask.element_size())
    if any(stride % unit for stride in strides[:3]):
        unit = 1
    return unit, (*(stride // unit for stride in strides[:3]), 1), True


def _may_share(p: Problem, call: Call) -> bool:
    """Whether v may be the first columns of k (as in MLA with absorbed projections), read once: as far as shapes and
    strides tell."""
    (head, _), (value, rest) = parts(p.head_dim), parts(p.value_dim)
    same = call.k.stride() == call.v.stride() and p.value_dim <= p.head_dim
    return same and head == value == p.value_dim and not rest


_PRECISIONS = {torch.float32: ("ieee", "tf32x3", "tf32")}


def _precision(p: Problem) -> str:
    """Of float32 products. Three products of TF32 are as exact as float32 is; TF32 alone where the user let torch's own
    products use it. The interpreter has but one way."""
    if p.dtype != torch.float32 or p.device != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
