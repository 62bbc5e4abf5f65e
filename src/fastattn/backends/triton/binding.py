"""What kernels in plain Triton share around the kernel: how the calls of one kind are brought to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...call import Call, Problem
from ..base import ForwardOnly, Kernel
from ..layout import Fresh
from .binaries.launcher import prepare
from .bounds import Bounds

TILE = 64  #: rows whose bounds one program finds


class WithSegments(ForwardOnly):
    """Calls with segments, for a kernel that takes Intervals: another one before it finds the keys of each row."""

    __slots__ = ("_bounds", "_kernel", "_memory")

    def __init__(self, p: Problem, call: Call, bind: Callable[[Problem, Call], Kernel]) -> None:
        """bind: gives the kernel for the same calls with Intervals."""
        self._bounds = Bounds(p, call, TILE)
        prepare(self._bounds.launches(call))
        nothing = torch.empty(self._bounds.size, dtype=torch.uint8, device="meta")
        self._kernel = bind(with_intervals(p), with_bounds(call, self._bounds, nothing))
        #: Not scratch memory, which the kernel writes to while it reads the bounds.
        self._memory = Fresh((self._bounds.size,), (1,), torch.uint8, call.q.device)

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        memory = self._memory()
        self._bounds(call, memory)
        return self._kernel.forward(with_bounds(call, self._bounds, memory))


def with_bounds(call: Call, bounds: Bounds, memory: Tensor) -> Call:
    """A call whose segments and band `bounds` wrote to the memory as Intervals."""
    numbers, shape, strides = memory[: bounds.size].view(torch.int32), call.q.shape[::2], (bounds.tiles * TILE, 1)
    lo, hi = (numbers.as_strided(shape, strides, at) for at in (bounds.lo_at, bounds.hi_at))
    return call._replace(lo=lo, hi=hi, segments=None, left=-1, right=-1)


def with_intervals(p: Problem) -> Problem:
    """The problem of calls whose segments and band were written as Intervals, a pair for each query."""
    return replace(p, mask="intervals", mask_shape=(p.batch, p.q_len), mask_dtype=torch.int32, left=-1, right=-1)


class WithCopies(ForwardOnly):
    """Calls with tensors that a kernel cannot read where they are."""

    __slots__ = ("_kernel", "_problem")

    def __init__(self, p: Problem, kernel: Kernel) -> None:
        """kernel: of the copies that `readable` makes, whose layout follows from the calls'."""
        self._problem = p
        self._kernel = kernel

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        out, lse = self._kernel.forward(readable(self._problem, call)[0])
        return out.to(self._problem.dtype), lse


def readable(p: Problem, call: Call) -> tuple[Call, Problem]:
    """The call, what the kernels cannot read in place copied; the same object if there is no such thing."""
    if p.device == "cpu" and p.dtype == torch.bfloat16:  # Triton's interpreter multiplies bfloat16's bits as integers
        q, k, v = (x.float() for x in (call.q, call.k, call.v))
        return readable(replace(p, dtype=torch.float32), call._replace(q=q, k=k, v=v))
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


def tf32_is_allowed() -> bool:
    """Whether the user let torch's own float32 GEMMs use TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
