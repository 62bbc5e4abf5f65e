"""Which calls the portable backward serves, and which binaries they take. Does not import triton."""

from __future__ import annotations

from ....call import Problem
from .. import limits
from . import launch_config
from .backward import binaries, bind

__all__ = ["binaries", "bind", "reasons"]


def reasons(problem: Problem) -> list[str]:
    """Why the kernels cannot serve a problem with gradients. Empty: they can."""
    return limits.many_queries(problem, launch_config.fits)
