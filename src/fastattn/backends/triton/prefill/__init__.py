"""Prefill: a plain Triton kernel for many queries, with every feature, on every GPU that Triton serves."""

from __future__ import annotations

from collections.abc import Sequence

from ....call import Call, Problem
from ...base import Kernel
from .. import limits
from ..binaries.flag_set import FlagSet
from ..limits import HEAD_DIMS, MOST_TOKENS, VALUE_DIMS
from . import launch_config


class PrefillBackend:
    """See `kernel.py` and `forward.py`, and `backward/`. triton is imported when a kernel has to be compiled."""

    name = "prefill"
    gives_lse = True
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        if problem.backward:
            from ..backward import launch

            return launch.reasons(problem)
        p, why = problem, limits.refusals(problem, HEAD_DIMS, VALUE_DIMS)
        if max(p.q_len, p.kv_len) > MOST_TOKENS:
            why.append(f"takes up to {MOST_TOKENS} tokens")
        if not why and not launch_config.fits(p):
            why.append("head and value dims take more shared memory than a program may have on this GPU")
        return why

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        if problem.device != "cuda":  # Triton's interpreter has none
            return []
        if problem.backward:
            from ..backward import launch

            return launch.binaries(problem)
        from .forward import binaries

        return binaries(problem)

    def bind(self, problem: Problem, call: Call) -> Kernel:
        if problem.backward:
            from ..backward import launch

            return launch.bind(problem, call)
        from .forward import bind

        return bind(problem, call)
