"""The kernel for many queries bound to one kind of call: what is launched, and what has to be copied to be read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....call import CALL, Call, Problem
from ...base import ForwardOnly, Kernel
from ...layout import Output, RowNumbers, aligned
from ...scratch import scratch
from ..arguments import band, broadcast_strides, exponent_factors, same_strides, strides_in_units
from ..binaries.flag_set import FlagSet
from ..binaries.launcher import BinaryLauncher, flag_sets, launcher_of, prepare, rooms_of
from ..binaries.launcher import Launch as Prepared
from ..binaries.triton_kernel import NamedKernel
from ..binding import TILE, WithCopies, WithSegments, readable, tf32_is_allowed, with_intervals
from ..bounds import Bounds
from ..launcher import Launcher
from ..program import Program, named
from ..representative import representative, stand_in
from ..tile_parts import parts
from .batch import BatchKernel, serves
from .launch_config import Launch, by_head, choose, listed
from .lists import Lists, mask_layout

_FORWARD = NamedKernel(f"{__package__}.kernel", "forward_kernel")


def bind(problem: Problem, call: Call, launch: Launch | None = None) -> Kernel:
    """See `Backend.bind`. launch: how, if not as `choose` says."""
    if call.segments is not None:
        return WithSegments(problem, call, partial(bind, launch=launch))
    found, p = readable(problem, call)
    kernel = kernel_of(p, found, launch or choose(p))
    return kernel if found is call else WithCopies(problem, kernel)


def kernel_of(p: Problem, call: Call, launch: Launch) -> PrefillKernel | BatchKernel:
    """The kernel for a call that it can read."""
    return (BatchKernel if serves(p, call, launch) else PrefillKernel)(p, call, launch)


def binaries(problem: Problem) -> list[FlagSet]:
    """See `Compiled.binaries`."""
    call = representative(problem)
    before: list[Prepared] = []
    if call.segments is not None:
        before = Bounds(problem, call, TILE).launches(call)
        problem = with_intervals(problem)
        call = representative(problem)
    launches = kernel_of(problem, call, choose(problem)).launches(call) + before
    return flag_sets(launches)


class PrefillKernel(ForwardOnly):
    """The kernel, and those that list its blocks of keys, bound to one problem and one set of strides."""

    __slots__ = ("_forward", "_lists", "_lse", "_output", "_problem")

    def __init__(self, p: Problem, call: Call, launch: Launch) -> None:
        self._problem = p
        self._output = Output(p, call.q)
        self._lse = RowNumbers(p, call.q) if p.return_lse or p.grads else None
        self._lists = Lists(p, call, launch.block_m, launch.block_n) if listed(p, launch) else None
        integers, constants = _arguments(p, call, launch, self._lists.strides if self._lists else (0, 0, 0))
        grid = (-(-p.q_len // launch.block_m) * p.batch * p.q_heads,)
        self._forward = {
            (in_k, precision): launcher_of(
                _FORWARD,
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
        found = [self._stand_in(self._forward[in_k, precision_of(self._problem)], call)]
        return found + self._lists.launches(call) if self._lists else found

    def _stand_in(self, launcher: BinaryLauncher | Launcher, call: Call) -> Prepared:
        """The launch of the kernel, where nothing is made for it."""
        lse, lists = stand_in(torch.float32) if self._lse else None, stand_in(torch.int32) if self._lists else None
        return self._launch(launcher, call, stand_in(self._output.dtype), lse, lists)

    def _launch(self, launcher: BinaryLauncher | Launcher, call: Call, out: Any, lse: Any, lists: Any) -> Prepared:
        """The launch of the kernel. Takes `Named` in the place of tensors, too."""
        read = call.mask, lists, call.lo, call.hi, call.sinks, call.q_lengths, call.kv_lengths
        return launcher, (call.q, call.k, call.v, out, lse, *read), exponent_factors(self._problem, call.scale)

    def _in_k(self, call: Call, precision: str) -> bool:
        return (True, precision) in self._forward and call.v.data_ptr() == call.k.data_ptr()

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        p, q = self._problem, call.q
        out = self._output()
        lse = None if self._lse is None else self._lse()
        lists = self._lists(call, scratch(q.device, self._lists.size)) if self._lists else None
        precision = precision_of(p)
        launcher = self._forward[self._in_k(call, precision), precision]
        _, tensors, floats = self._launch(launcher, call, out, lse, lists)
        launcher(tensors, floats)
        return out, lse

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`."""
        precision = precision_of(self._problem)
        if self._problem.dtype == torch.float32 or self._in_k(call, precision):
            return None  # (torch may be told to use TF32)
        names = [name for name in CALL.tensor_names if getattr(call, name) is not None]
        if not aligned(*[getattr(call, name) for name in names]):
            return None
        program = Program.of_forward(self._output, self._lse, 0 if self._lists is None else self._lists.size, names)
        program.apart = (True, precision) in self._forward
        if self._lists is not None and not self._lists.add_to(program, call):
            return None
        launcher = self._forward[False, precision]
        rooms = rooms_of([self._stand_in(launcher, call)])
        if rooms is None:
            return None
        own = [program.own(name) for name in ("out", "lse", "memory")]
        program.add_all(rooms, [self._launch(launcher, named(call), *own)])
        return program


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
    mask_rows = p.masked_rows
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
