"""The reference as a backend: serves everything, slowly."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..problem import Call, Gradients, Problem


class ReferenceBackend:
    """See `fastattn.reference`."""

    name = "reference"

    def reasons(self, problem: Problem) -> list[str]:
        return []

    def forward(self, problem: Problem, call: Call) -> tuple[Tensor, Tensor | None]:
        return reference.forward(problem, call)

    def backward(
        self, problem: Problem, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        return reference.backward(problem, call, out, lse, grad_out, grad_lse)
