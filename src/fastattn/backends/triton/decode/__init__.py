"""Decode: a split-KV Triton kernel for few queries against many keys, and for many where there is a softcap."""

from __future__ import annotations

from collections.abc import Sequence

from ....call import Call, Problem
from ...base import Kernel
from .. import limits
from ..binaries.flag_set import FlagSet
from . import forward
from . import launch_config as launch
from .shapes import MAX_ROWS

HEAD_DIMS = range(8, 577, 8)  #: of q and k
VALUE_DIMS = range(8, 513, 8)  #: of v: 64 rows of more do not fit the registers


class DecodeBackend:
    """See `kernel.py` and `forward.py`. triton is imported when a kernel has to be compiled."""

    name = "decode"
    gives_lse = True
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        p, why = problem, limits.refusals(problem, HEAD_DIMS, VALUE_DIMS)
        if p.grads:
            why.append("has no gradients")
        if not launch.fits(p):
            why.append(f"too many queries: {p.q_len} x {p.group} heads per K/V head, a tile has {MAX_ROWS} rows")
        return why

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        if problem.device != "cuda":  # Triton's interpreter has none
            return []
        return forward.binaries(problem)

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return forward.bind(problem, call)
