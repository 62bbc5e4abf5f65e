"""The passes of the backward bound to one kind of call: what is launched, and the memory between the launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....call import Call, Gradients, Problem, as_token_major, token_major
from ...base import BackwardOnly
from ...layout import Contiguous, TokenMajor
from ...scratch import scratch
from ..arguments import broadcast_strides
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import Launch as Prepared
from ..binaries.launcher import flag_sets, launches_binary, prepare
from ..binding import TILE, readable, with_bounds, with_intervals
from ..bounds import Bounds
from ..prefill.forward import precision_of
from ..program import Program
from ..representative import representative, stand_in
from .before import Before
from .launch_config import Launch, choose, variants
from .passes import Passes
from .rooms import MOST_LAYOUTS, Launches, Quick, floats_of
from .sizes import Sizes


def bind(problem: Problem, call: Call, launch: Launch | None = None) -> BackwardKernel | WithCopies:
    """The kernels for every call of one kind. launch: how, if not as `choose` says."""
    found, p = readable(problem, call)
    kernel = BackwardKernel(p, found, launch)
    return kernel if found is call else WithCopies(problem, kernel)


def binaries(problem: Problem) -> list[FlagSet]:
    """The flag sets that calls like this one need, those of its own lengths first."""
    call = representative(problem)
    found: dict[FlagSet, None] = {}
    for launch, group_parts in variants(with_intervals(problem) if call.segments is not None else problem):
        launches = BackwardKernel(problem, call, launch, group_parts).launches(call)
        found |= dict.fromkeys(flag_sets(launches))
    return list(found)


class _Upstream(NamedTuple):
    """What a backward gets besides the call. grad_lse: None unless the log-sum-exp was differentiated."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def layouts(self) -> tuple[tuple[int, ...] | None, ...]:
        """Strides, 0 along the dims of which there is one; of out and grad_out in units of 8 elements."""
        out, grad_out = (tuple([n // 8 for n in broadcast_strides(x, 4)[:3]]) for x in (self.out, self.grad_out))
        lse = broadcast_strides(self.lse, 3)
        return out, grad_out, lse, None if self.grad_lse is None else broadcast_strides(self.grad_lse, 3)


class BackwardKernel(BackwardOnly):
    """The passes bound to one problem and one set of strides of the call's tensors."""

    __slots__ = ("_before", "_bounds", "_call_layout", "_grads", "_passes", "_problem", "_quick", "_sizes")

    def __init__(
        self, problem: Problem, call: Call, launch: Launch | None = None, group_parts: int | None = None
    ) -> None:
        #: With segments: what finds the keys of each row first; then the problem is one of Intervals.
        self._bounds = Bounds(problem, call, TILE) if call.segments is not None else None
        p = self._problem = problem if self._bounds is None else with_intervals(problem)
        before = 0 if self._bounds is None else self._bounds.size
        bounded = self._bounded(call, torch.empty(before, dtype=torch.uint8, device="meta"))
        launch = launch or choose(p)
        self._before = Before(p, bounded, launch)
        self._sizes = Sizes(p, launch, before, self._before, group_parts)
        self._call_layout = Passes.layout(p, bounded)
        self._passes: dict[object, Passes] = {}
        makers = {name: TokenMajor(x.shape, x) for name, x in zip("qkv", (call.q, call.k, call.v), strict=True)}
        others = {name[0]: Contiguous(x) for name, x in (("mask", call.mask), ("sinks", call.sinks)) if x is not None}
        #: What makes each of `Gradients`, None where it is not asked for.
        self._grads = [(makers | others)[name[0]] if name[0] in p.grads else None for name in Gradients._fields]
        launches = self.launches(call)
        prepare(launches)
        binaries = all(launches_binary(launcher) for launcher, _, _ in launches)
        self._quick: Quick | None = None
        if binaries and self._bounds is None:
            self._quick = Quick(p, call, self._sizes.pieces, self._grads)

    def launches(self, call: Call) -> list[Prepared]:
        """What a backward launches, for upstream tensors as they usually are."""
        p = self._problem
        lse = torch.empty(p.batch, p.q_heads, p.q_len, device="meta")
        out = token_major(stand_in(p.dtype), p.batch, p.q_heads, p.q_len, p.value_dim)
        found: list[Prepared] = [] if self._bounds is None else self._bounds.launches(call)
        bounded = self._bounded(call, torch.empty(self._sizes.pieces.total, dtype=torch.uint8, device="meta"))
        found += self._before.launches(bounded)
        for grad_lse in (None, lse) if p.return_lse else (None,):
            up = _Upstream(out, lse, out, grad_lse)
            passes = self._passes_for(up, call.q.device)
            found += passes.launches(bounded, up.grad_lse is not None)
        return found

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The gradients that `problem.grads` names."""
        if self._quick is not None:
            quick = self._quick(call, (out, lse, grad_out, grad_lse))
            if quick is not None:
                return quick
        device = call.q.device
        memory = scratch(device, self._sizes.pieces.total)
        if self._bounds is not None:
            self._bounds(call, memory)
            call = self._bounded(call, memory)
        up = _Upstream(_rows_of(out), lse, _rows_of(grad_out), grad_lse)
        grads = Gradients(*[None if make is None else make() for make in self._grads])
        pieces = self._sizes.pieces.cut(memory)
        in_order = self._in_order(up, device)
        for launcher, tensors, floats in in_order(call, up, pieces, grads):
            launcher(tensors, floats)
        if self._quick is not None and up.out is out and up.grad_out is grad_out:
            self._quick.remember(call, up, pieces, grads, in_order)
        return grads

    def backward_program(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor) -> Program | None:
        """See `backends.base.HasBackwardProgram`."""
        if self._quick is None or _rows_of(out) is not out or _rows_of(grad_out) is not grad_out:
            return None
        up = _Upstream(out, lse, grad_out, None)
        return self._quick.program(call, up, self._in_order(up, call.q.device))

    def _in_order(self, up: _Upstream, device: torch.device) -> Launches:
        """All launches but those of bounds, for upstream tensors that lie as these."""
        p, before, passes = self._problem, self._before, self._passes_for(up, device)

        def in_order(call: Call, upstream: Any, pieces: dict[str, Any], grads: Gradients) -> list[Prepared]:
            found = passes.in_order(call, upstream, pieces, grads, floats_of(p, call.scale))
            return before.in_order(call, pieces) + found

        return in_order

    def _passes_for(self, up: _Upstream, device: torch.device) -> Passes:
        key = *up.layouts(), precision_of(self._problem)
        found = self._passes.get(key)
        if found is None:
            if len(self._passes) >= MOST_LAYOUTS:
                self._passes.clear()
            found = Passes(self._problem, self._call_layout, self._sizes, up.layouts(), device)
            self._passes[key] = found
        return found

    def _bounded(self, call: Call, memory: Tensor) -> Call:
        return call if self._bounds is None else with_bounds(call, self._bounds, memory)


class WithCopies(BackwardOnly):
    """Calls with tensors that the kernels cannot read where they are."""

    __slots__ = ("_kernel", "_problem")

    def __init__(self, p: Problem, kernel: BackwardKernel) -> None:
        """kernel: of the copies that `readable` makes, whose layout follows from the calls'."""
        self._problem = p
        self._kernel = kernel

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """The gradients that `problem.grads` names."""
        found, p = readable(self._problem, call)
        grads = self._kernel.backward(found, out.to(p.dtype), lse, grad_out.to(p.dtype), grad_lse)
        dtype = self._problem.dtype
        q, k, v = (None if x is None else as_token_major(x, dtype) for x in grads[:3])
        return grads._replace(q=q, k=k, v=v)


def _rows_of(x: Tensor) -> Tensor:
    """x `[B,H,S,D]`, or a copy of it whose rows begin at multiples of 16 bytes."""
    strides = broadcast_strides(x, 4)
    if x.data_ptr() % 16 or strides[3] != 1 or any(n % 8 for n in strides[:3]):
        return token_major(x, *x.shape).copy_(x)
    return x
