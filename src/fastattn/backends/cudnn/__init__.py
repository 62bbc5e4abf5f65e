"""cuDNN attention through its frontend's graph API: prefill and training."""

from __future__ import annotations

from ...call import Call, Problem
from ..base import Kernel
from ..triton.launcher import has_triton
from . import runtime, support


class CudnnBackend:
    """cuDNN's fused attention, forward and backward, for float16 and bfloat16."""

    name = "cudnn"
    gives_lse = True
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

    def bind(self, problem: Problem, call: Call) -> Kernel:
        from .plan_policy import policy

        policy()  # raises where FASTATTN_PLANS has no valid value: some calls would never read it
        return CudnnKernel(problem, call)


class CudnnKernel:
    """Forward and backward of all calls of one kind; bound to a backward, that alone."""

    __slots__ = ("backward", "forward")

    def __init__(self, problem: Problem, call: Call) -> None:
        from .backward import Backward
        from .forward import bind_forward

        if not problem.backward:
            self.forward = bind_forward(problem, call).forward
        self.backward = Backward(problem).backward
