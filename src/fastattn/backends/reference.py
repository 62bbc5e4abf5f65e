"""The reference as a backend: it serves every call, slowly."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..call import Call, Gradients, Problem
from .base import Kernel


class ReferenceBackend:
    """See `fastattn.reference`."""

    name = "reference"
    gives_lse = True
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        return []

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return _ReferenceKernel(problem)


class _ReferenceKernel:
    __slots__ = ("_problem",)

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return reference.forward(self._problem, call)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        return reference.backward(self._problem, call, grad_out, grad_lse)
