"""The decode kernel bound to one kind of call: what is launched, and what has to be copied for it to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import Output
from ...scratch import scratch
from ..arguments import band, broadcast_strides, same_strides, strides_in_units
from ..binding import WithCopies, WithSegments, readable, tf32_is_allowed
from ..launcher import Launcher, overlaps
from .combine import combine_kernel
from .kernel import attend_kernel
from .launch_config import MAX_SPLITS, Launch, choose, gaps, is_wide, may_be_same, rows, shared_memory, sm_count


def bind(problem: Problem, call: Call) -> Kernel:
    """See `Backend.bind`."""
    if call.segments is not None:
        return WithSegments(problem, call, bind)
    found, p = readable(problem, call)
    if found is not call:
        return WithCopies(problem, DecodeKernel(p, found, _launch(problem)))
    if may_be_same(p) and same_strides(call.k, call.v):
        return _ValuesInKeys(p, call)
    return DecodeKernel(p, call, _launch(p))


def _launch(p: Problem, same: bool = False) -> Launch:
    return choose(p, sm_count(p.index), shared_memory(p.index), same)


class _ValuesInKeys(ForwardOnly):
    """Calls whose values may be the keys' first columns (absorbed MLA: one buffer holds both). They are where both
    begin at one address: then each key is read once. That is data: the next call may be another."""

    __slots__ = ("_apart", "_same")

    def __init__(self, p: Problem, call: Call) -> None:
        self._apart = DecodeKernel(p, call, _launch(p))
        self._same = DecodeKernel(p, call, _launch(p, same=True), same=True)

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        kernel = self._same if call.k.data_ptr() == call.v.data_ptr() else self._apart
        return kernel.forward(call)


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
            precision: Launcher(
                attend_kernel,
                grid,
                device,
                integers,
                (*constants, precision),
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
            for precision in (("ieee", "tf32") if p.dtype == torch.float32 else ("ieee",))
        }
        self._scratch = 4 * tiles * launch.splits * count * (p.value_dim + 2) if launch.splits > 1 else 0  #: bytes
        columns = 1 << (sum(launch.value) - 1).bit_length()
        columns = columns if columns <= 256 else 128  # of a program; wide rows are many programs
        chunk = 4096 // columns  # splits read at a time, so that they fill 32 registers a thread
        self._combine = Launcher(
            combine_kernel,
            (tiles, count, -(-p.value_dim // columns)),
            device,
            (p.q_len, launch.splits),
            (p.kv_heads, p.group, p.value_dim, columns, MAX_SPLITS, chunk, overlaps(p.capability)),
            num_warps=4,
        )

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, call.q
        out = self._output(q)
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
