"""Prefill: a plain Triton kernel for many queries, with every feature, on every GPU that Triton serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....call import Call, Problem
from ...base import Kernel
from ..binaries.flag_set import FlagSet
from ..launcher import missing
from . import launch_config

MIN_CAPABILITY = (8, 0)  #: Ampere: the first with bfloat16 tensor cores and asynchronous copies
HEAD_DIMS = range(8, 577, 8)
VALUE_DIMS = range(8, 513, 8)
_MOST_TOKENS = 1 << 28  #: positions and windows do not overflow together


class PrefillBackend:
    """See `kernel.py` and `forward.py`. triton is imported with the first call that it serves."""

    name = "prefill"
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        p, why = problem, []
        if p.device == "cuda" and p.capability < MIN_CAPABILITY:
            why.append(f"needs compute capability 8.0 or newer, this GPU has {p.capability[0]}.{p.capability[1]}")
        why += missing(p.device)
        if p.grads:
            why.append("has no gradients")
        if p.dtype == torch.float64:
            why.append("float64 is the reference's")
        if p.empty:
            why.append("no queries or no keys")
        if max(p.q_len, p.kv_len) > _MOST_TOKENS:
            why.append(f"takes up to {_MOST_TOKENS} tokens")
        for name, dim, dims in (("head", p.head_dim, HEAD_DIMS), ("value", p.value_dim, VALUE_DIMS)):
            if dim not in dims:
                why.append(f"{name} dim {dim} is not a multiple of 8 up to {dims[-1]}")
        if not why and not launch_config.fits(p):
            why.append("head and value dims take more shared memory than a program may have on this GPU")
        return why

    def binaries(self, problem: Problem) -> Sequence[FlagSet]:
        if problem.device != "cuda":  # Triton's interpreter has none
            return []
        from .forward import binaries

        return binaries(problem) if problem.device == "cuda" else []  # the interpreter takes none

    def bind(self, problem: Problem, call: Call) -> Kernel:
        from .forward import bind

        return bind(problem, call)
