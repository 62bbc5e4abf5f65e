"""Forward and backward for Hopper GPUs (compute capability 9.0), in Gluon."""

from __future__ import annotations

from collections.abc import Sequence

from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from ..binaries.flag_set import FlagSet
from ..hopper_backward import launch as backward
from . import launch


class HopperBackend:
    """See `launch.py`, and that of `hopper_backward`. triton is imported when a kernel has to be compiled."""

    name = "hopper"
    gives_lse = True
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        if problem.backward:
            return backward.reasons(problem)
        why = launch.reasons(problem)
        if problem.dense_mask:
            why.append("its kernel for masks of keys has not been verified on a GPU since it was last changed")
        return why

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        return backward.binaries(problem) if problem.backward else launch.all_flags(problem)

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return backward.bind(problem, call) if problem.backward else _HopperKernel(launch.Forward(problem, call))


class _HopperKernel(ForwardOnly):
    __slots__ = ("forward",)

    def __init__(self, forward: launch.Forward) -> None:
        self.forward = forward  #: of a call: its output and log-sum-exp
