"""The reference as a backend: serves everything, slowly."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import reference
from ..call import Call, Gradients, Problem
from .base import Runner


class ReferenceBackend:
    """See `fastattn.reference`."""

    name = "reference"
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        return []

    def bind(self, problem: Problem, call: Call) -> Runner:
        return partial(reference.forward, problem)

    def backward(
        self, problem: Problem, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        return reference.backward(problem, call, grad_out, grad_lse)
