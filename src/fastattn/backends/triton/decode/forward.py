"""The decode kernel bound to one kind of call: what is launched, and what has to be copied for it to be read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import Output
from ...scratch import scratch
from ..arguments import band, broadcast_strides, same_strides, strides_in_units
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import flag_sets, launcher_of, prepare
from ..binaries.triton_kernel import NamedKernel
from ..binding import TILE, WithCopies, WithSegments, readable, tf32_is_allowed, with_intervals
from ..bounds import Bounds
from ..launcher import overlaps
from ..limits import shared_memory, sm_count
from ..representative import representative, stand_in
from .family import family
from .launch_config import MAX_SPLITS, Launch, choose, gaps, is_wide, may_be_same, rows

_ATTEND = NamedKernel(f"{__package__}.kernel", "attend_kernel")
_COMBINE = NamedKernel(f"{__package__}.combine", "combine_kernel")
#: Tensors of each, the first ones, whose alignment changes its code. Of masks and lengths it does not: their strides
#: are arguments. So a slice of lengths takes the same binary.
_ATTEND_ALIGNED, _COMBINE_ALIGNED = 6, 3


def bind(problem: Problem, call: Call) -> Kernel:
    """See `Backend.bind`."""
    if call.segments is not None:
        return WithSegments(problem, call, bind)
    found, p = readable(problem, call)
    if found is call and may_be_same(p) and same_strides(call.k, call.v):
        return _ValuesInKeys(p, call)
    kernel = DecodeKernel(p, found, _launch(p if found is call else problem))
    prepare(kernel.launches(found))
    return kernel if found is call else WithCopies(problem, kernel)


def _launch(p: Problem, same: bool = False) -> Launch:
    return choose(p, sm_count(p.index), shared_memory(p.index), same)


def binaries(problem: Problem) -> list[FlagSet]:
    """See `Compiled.binaries`: of calls with any batch, any number of keys, and any of queries that this kernel
    takes."""
    found: dict[FlagSet, None] = {}
    before: list[Prepared] = []
    if problem.mask == "segments":
        call = representative(problem)
        before = Bounds(problem, call, TILE).launches(call)
    seen = set()
    for other in family(problem, sm_count(problem.index)):
        p = with_intervals(other) if other.mask == "segments" else other
        for same in (False, True) if _in_keys(p) else (False,):
            launch = _launch(p, same)
            looked_at = replace(launch, splits=min(launch.splits, 2)), gaps(p), same
            if looked_at not in seen:
                seen.add(looked_at)
                call = representative(p)
                found |= dict.fromkeys(flag_sets(DecodeKernel(p, call, launch, same).launches(call)))
    return list(found | dict.fromkeys(flag_sets(before)))


def _in_keys(p: Problem) -> bool:
    """True when the values are probably the keys' first columns: absorbed MLA. (They are so, or not, by their
    addresses; where nobody expects it their binary is compiled when the first such call comes.)"""
    return p.kv_heads == 1 and p.value_dim < p.head_dim and may_be_same(p)


class _ValuesInKeys(ForwardOnly):
    """Calls whose values may be the keys' first columns (absorbed MLA: one buffer holds both). They are where both
    begin at one address: then each key is read once. That is data: the next call may be another."""

    __slots__ = ("_apart", "_same")

    def __init__(self, p: Problem, call: Call) -> None:
        self._apart = DecodeKernel(p, call, _launch(p))
        self._same = DecodeKernel(p, call, _launch(p, same=True), same=True)
        prepare(self._kernel(call).launches(call))

    def _kernel(self, call: Call) -> DecodeKernel:
        return self._same if call.k.data_ptr() == call.v.data_ptr() else self._apart

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._kernel(call).forward(call)


class DecodeKernel(ForwardOnly):
    """The two kernels, bound to one problem and one set of strides. same: of calls whose v is k's first columns."""

    __slots__ = ("_attend", "_combine", "_lse", "_output", "_problem", "_scratch", "_softcap", "same")

    def __init__(self, p: Problem, call: Call, launch: Launch, same: bool = False) -> None:
        self._problem, self.same = p, same
        device, tiles, count = call.q.device, p.batch * p.kv_heads, rows(p)
        self._output = Output(p, call.q)
        self._lse = (p.batch, p.q_heads, p.q_len) if p.return_lse else None
        self._softcap = p.softcap or None
        integers, constants = _arguments(p, launch, call, same)
        blocks = -(-count // launch.block_m)
        grid = (tiles * blocks, launch.splits, 1) if launch.near else (tiles, launch.splits, blocks)
        self._attend = {
            precision: launcher_of(
                _ATTEND,
                grid,
                device,
                p.capability,
                integers,
                (*constants, precision),
                _ATTEND_ALIGNED,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
            for precision in (("ieee", "tf32") if p.dtype == torch.float32 else ("ieee",))
        }
        self._scratch = 4 * tiles * launch.splits * count * (p.value_dim + 2) if launch.splits > 1 else 0  #: bytes
        columns = 1 << (sum(launch.value) - 1).bit_length()
        columns = columns if columns <= 256 else 128  # of a program; wide rows are many programs
        chunk = 4096 // columns  # splits read at a time, so that they fill 32 registers a thread
        self._combine = launcher_of(
            _COMBINE,
            (tiles, count, -(-p.value_dim // columns)),
            device,
            p.capability,
            (p.q_len, launch.splits),
            (p.kv_heads, p.group, p.value_dim, columns, MAX_SPLITS, chunk, overlaps(p.capability)),
            _COMBINE_ALIGNED,
            num_warps=4,
        )

    def launches(self, call: Call) -> list[Prepared]:
        """What a call launches, the kernel first."""
        p = self._problem
        out, lse = stand_in(p.dtype), stand_in(torch.float32) if self._lse else None
        parts = stand_in(torch.float32) if self._scratch else None
        tensors = call.q, call.k, call.v, out, lse, parts, *_masking(call)
        found: list[Prepared] = [(self._attend[_precision(p.dtype)], tensors, (1.0, self._softcap))]
        return [*found, (self._combine, (parts, out, lse, call.sinks), ())] if self._scratch else found

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, call.q
        out = self._output()
        lse = torch.empty(self._lse, dtype=torch.float32, device=q.device) if self._lse else None
        parts = scratch(q.device, self._scratch).view(torch.float32) if self._scratch else None
        self._attend[_precision(p.dtype)](
            (q, call.k, call.v, out, lse, parts, *_masking(call)),
            (call.scale, self._softcap),
        )
        if parts is not None:
            self._combine((parts, out, lse, call.sinks))
        return out, lse


def _masking(call: Call) -> tuple[Tensor | None, ...]:
    """What masks, in the order of the kernel's arguments."""
    return call.mask, call.lo, call.hi, call.sinks, call.q_lengths, call.kv_lengths


def _arguments(p: Problem, launch: Launch, call: Call, same: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kernel's integers and constants."""
    unit, strides = strides_in_units(call)
    masks = *broadcast_strides(call.mask, 4), *broadcast_strides(call.lo, 2)
    integers = (*strides, *masks, p.q_len, p.kv_len, *band(p))
    blocks = (launch.block_m, launch.block_n, *launch.head, *launch.value)
    flags = (gaps(p), launch.near, is_wide(p), same)
    return integers, (p.kv_heads, p.group, p.head_dim, p.value_dim, *blocks, unit, *flags)


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user let torch's own use TF32. Other dtypes have only one way."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() else "ieee"
