"""Prefill: a plain Triton kernel for many queries, with every feature, on every GPU that Triton serves."""

from __future__ import annotations

from collections.abc import Sequence

from ....call import Call, Problem
from ...base import Kernel
from .. import limits
from ..backward import launch
from ..binaries.flag_set import FlagSet
from . import forward, launch_config


class PrefillBackend:
    """See `kernel.py` and `forward.py`, and `backward/`. triton is imported when a kernel has to be compiled."""

    name = "prefill"
    gives_lse = True
    reads_lse = True

    def reasons(self, problem: Problem) -> list[str]:
        if problem.backward:
            return launch.reasons(problem)
        return limits.many_queries(problem, launch_config.fits)

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        if problem.device != "cuda":  # Triton's interpreter has none
            return []
        return launch.binaries(problem) if problem.backward else forward.binaries(problem)

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return launch.bind(problem, call) if problem.backward else forward.bind(problem, call)
