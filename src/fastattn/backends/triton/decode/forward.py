"""The decode kernel bound to one kind of call: what is launched, and what has to be copied for it to be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .... import masks
from ....call import Call, Gradients, Problem
from ...base import Kernel
from ...layout import Output
from ...scratch import scratch
from ..launcher import Launcher, overlaps
from .combine import combine_kernel
from .kernel import attend_kernel
from .launch_config import MAX_SPLITS, Launch, choose, gaps, is_wide, may_be_same, rows, shared_memory, sm_count


def bind(problem: Problem, call: Call) -> Kernel:
    """See `Backend.bind`."""
    if call.segments is not None:
        return _WithSegments(problem, call)
    readable, p = _readable(problem, call)
    if readable is not call:
        return _WithCopies(problem)
    if may_be_same(p) and _same_strides(call.k, call.v):
        return _ValuesInKeys(p, call)
    return DecodeKernel(p, call, _launch(p))


def _launch(p: Problem, same: bool = False) -> Launch:
    return choose(p, sm_count(p.index), shared_memory(p.index), same)


def _same_strides(k: Tensor, v: Tensor) -> bool:
    """True when v, if it begins where k begins, is k's first columns."""
    both = zip(k.shape[:3], k.stride(), v.stride(), strict=False)
    return all(one == other for size, one, other in both if size > 1)


class _Forward:
    """A kernel without a backward."""

    __slots__ = ()

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        raise AssertionError("unreachable: `reasons` refuses problems with gradients")


class _WithSegments(_Forward):
    """Calls with segments: the kernel takes Intervals."""

    __slots__ = ("_kernel", "_problem")

    def __init__(self, p: Problem, call: Call) -> None:
        self._problem = p
        self._kernel = bind(*masks.as_intervals(p, call))

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return self._kernel.forward(masks.as_intervals(self._problem, call)[1])


class _ValuesInKeys(_Forward):
    """Calls whose values may be the keys' first columns (absorbed MLA: one buffer holds both). They are where both
    begin at one address: then each key is read once. That is data: the next call may be another."""

    __slots__ = ("_apart", "_same")

    def __init__(self, p: Problem, call: Call) -> None:
        self._apart = DecodeKernel(p, call, _launch(p))
        self._same = DecodeKernel(p, call, _launch(p, same=True), same=True)

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        kernel = self._same if call.k.data_ptr() == call.v.data_ptr() else self._apart
        return kernel.forward(call)


class _WithCopies(_Forward):
    """Calls with tensors that the kernel cannot read where they are."""

    __slots__ = ("_problem",)

    def __init__(self, p: Problem) -> None:
        self._problem = p

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        readable, p = _readable(self._problem, call)
        kernel = DecodeKernel(p, readable, _launch(self._problem))
        out, lse = kernel.forward(readable)
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


class DecodeKernel(_Forward):
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
    flat = [stride for x in (call.q, call.k, call.v) for stride in x.stride()[:3]]
    # A stride known to be a multiple of 8 lets 16 bytes be loaded at once.
    unit = 1 if any(stride % 8 for stride in flat) else 8
    far = p.q_len + p.kv_len  # as good as open, and no position overflows by it
    left, right = (far if side < 0 else min(side, far) for side in (p.left, p.right))
    integers = (
        *(stride // unit for stride in flat),
        *_broadcast_strides(p.mask_shape, None if call.mask is None else call.mask.stride(), 4),
        *_broadcast_strides(p.mask_shape, None if call.lo is None else call.lo.stride(), 2),
        p.q_len,
        p.kv_len,
        left,
        right,
    )
    blocks = (launch.block_m, launch.block_n, *launch.head, *launch.value)
    flags = (gaps(p), launch.near, is_wide(p), same)
    return integers, (p.kv_heads, p.group, p.head_dim, p.value_dim, *blocks, unit, *flags)


def _broadcast_strides(shape: tuple[int, ...], strides: tuple[int, ...] | None, dims: int) -> tuple[int, ...]:
    """The strides, 0 along the dims that are broadcast."""
    if strides is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user let torch's own use TF32. Other dtypes have only one way."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
