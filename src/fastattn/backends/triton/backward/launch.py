"""Which calls the portable backward serves, and which binaries they take. Does not import triton."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ....call import Call, Problem
from .. import limits
from ..binaries.flag_set import FlagSet
from ..limits import HEAD_DIMS, MOST_TOKENS, VALUE_DIMS
from . import launch_config

if TYPE_CHECKING:
    from .backward import BackwardKernel, WithCopies


def reasons(problem: Problem) -> list[str]:
    """Why the kernels cannot serve a problem with gradients. Empty: they can."""
    p, why = problem, limits.refusals(replace(problem, grads=""), HEAD_DIMS, VALUE_DIMS)
    if max(p.q_len, p.kv_len) > MOST_TOKENS:
        why.append(f"takes up to {MOST_TOKENS} tokens")
    if not why and not launch_config.fits(p):
        why.append("head and value dims take more shared memory than a program may have on this GPU")
    return why


def bind(problem: Problem, call: Call) -> BackwardKernel | WithCopies:
    """The kernels for every call of the same kind. Raises what `binaries.launcher.prepare` raises."""
    from . import backward

    return backward.bind(problem, call)


def binaries(problem: Problem) -> list[FlagSet]:
    """The flag sets that calls like this one need."""
    if problem.device != "cuda":  # Triton's interpreter has none
        return []
    from . import backward

    return backward.binaries(problem)
