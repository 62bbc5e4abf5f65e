"""cuDNN attention."""

from __future__ import annotations

from torch import Tensor

from ...problem import Call, Gradients, Problem


class CudnnBackend:
    name = "cudnn"

    def reasons(self, problem: Problem) -> list[str]:
        return ["not built yet"]

    def forward(self, problem: Problem, call: Call) -> tuple[Tensor, Tensor | None]:
        raise AssertionError

    def backward(
        self, problem: Problem, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        raise AssertionError
