"""Decode: a split-KV Triton kernel for few queries against many keys, and for many where there is a softcap."""

from __future__ import annotations

import torch

from ....call import Call, Problem
from ...base import Kernel
from ..launcher import missing
from . import launch_config as launch

MIN_CAPABILITY = (8, 0)  #: Ampere: the first with bfloat16 tensor cores and asynchronous copies
HEAD_DIMS = range(8, 577, 8)  #: of q and k
VALUE_DIMS = range(8, 513, 8)  #: of v: 64 rows of more do not fit the registers


class DecodeBackend:
    """See `kernel.py` and `forward.py`. triton is imported with the first call that it serves."""

    name = "decode"
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        p, why = problem, []
        if p.device == "cuda":
            if p.capability < MIN_CAPABILITY:
                why.append(f"needs compute capability 8.0 or newer, this GPU has {p.capability[0]}.{p.capability[1]}")
        why += missing(p.device)
        if p.grads:
            why.append("has no gradients")
        if p.dtype == torch.float64:
            why.append("float64 is the reference's")
        if p.empty:
            why.append("no queries or no keys")
        if not launch.fits(p):
            why.append(f"too many queries: {p.q_len} x {p.group} heads per K/V head, a tile has {launch.MAX_ROWS} rows")
        for name, dim, dims in (("head", p.head_dim, HEAD_DIMS), ("value", p.value_dim, VALUE_DIMS)):
            if dim not in dims:
                why.append(f"{name} dim {dim} is not a multiple of 8 up to {dims[-1]}")
        return why

    def bind(self, problem: Problem, call: Call) -> Kernel:
        from .forward import bind

        return bind(problem, call)
