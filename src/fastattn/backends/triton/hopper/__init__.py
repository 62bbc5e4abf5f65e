"""Forward and backward for Hopper GPUs (compute capability 9.0), in Gluon."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from ....call import Call, Problem
from ...base import ForwardOnly, Kernel
from .. import prefill
from ..binaries.flag_set import FlagSet
from ..program import Program
from ..representative import representative
from . import launch, tensors
from .limits import is_wide


class HopperBackend:
    """See `launch.py`, and those of `hopper_wide` and `hopper_backward`. triton is imported when one has to be
    compiled."""

    name = "hopper"
    gives_lse = True
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        if problem.backward:
            why: list[str] = _backward().reasons(problem)
            if problem.mask == "additive" and not why:
                why.append(
                    "its gradients of rows whose keys all have a very low bias, such as finfo.min, are too large"
                )
            return why
        return _wide().reasons(problem) if is_wide(problem) else launch.reasons(problem)

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        if problem.backward:
            return _backward().binaries(problem)
        if is_wide(problem):
            return _wide().binaries(problem)
        if problem.masked_rows:
            mask = representative(problem).mask
            if mask is not None and not tensors.tiles_readable(mask):
                return prefill.PrefillBackend().binaries(problem)
        return launch.binaries_of(problem)

    def bind(self, problem: Problem, call: Call) -> Kernel:
        if problem.backward:
            return _backward().bind(problem, call)
        if is_wide(problem):
            return _wide().bind(problem, call)
        if problem.masked_rows and call.mask is not None and not tensors.tiles_readable(call.mask):
            return prefill.PrefillBackend().bind(problem, call)  # the copy engine cannot read the mask
        return _HopperKernel(launch.Forward(problem, call))


def _backward() -> ModuleType:
    """Imported late: it imports files of this package."""
    from ..hopper_backward import launch

    return launch


def _wide() -> ModuleType:
    """Of head dims above 256. Imported late, as the other."""
    from ..hopper_wide import launch

    return launch


class _HopperKernel(ForwardOnly):
    __slots__ = ("forward",)

    def __init__(self, forward: launch.Forward) -> None:
        self.forward = forward  #: of a call: its output and log-sum-exp

    def program(self, call: Call) -> Program | None:
        """See `backends.base.HasProgram`."""
        return self.forward.program(call)
