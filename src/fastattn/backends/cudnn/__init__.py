"""cuDNN attention through its frontend's graph API: prefill and training."""

from __future__ import annotations

from torch import Tensor

from ...call import Call, Gradients, Problem
from ..base import Runner
from ..triton.launcher import has_triton
from . import runtime, support


class CudnnBackend:
    """cuDNN's fused attention, forward and backward, for float16 and bfloat16."""

    name = "cudnn"
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        if problem.device != "cuda":
            return ["cuDNN needs a CUDA device"]
        library = runtime.frontend()
        why = support.reasons(problem, library.version)
        if library.refusal:
            why.append(library.refusal)
        elif not has_triton():
            why.append("Triton, which computes offsets on the device, is missing: pip install 'fastattn[cuda]'")
        return why

    def bind(self, problem: Problem, call: Call) -> Runner:
        from .forward import bind
        from .plan_cache import policy

        policy()  # raises where FASTATTN_PLANS says nothing: some calls would never ask
        return bind(problem, call)

    def backward(
        self, problem: Problem, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        from .backward import backward

        return backward(problem, call, out, lse, grad_out, grad_lse)
