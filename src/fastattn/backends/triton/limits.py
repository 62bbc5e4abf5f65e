"""What a GPU must have for kernels in plain Triton, and which calls none of them takes. Does not import triton."""

from __future__ import annotations

import torch

from ...call import Problem
from .launcher import missing

#: Of the kernels for many queries, forward and backward.
HEAD_DIMS, VALUE_DIMS = range(8, 577, 8), range(8, 513, 8)
MOST_TOKENS = 1 << 28  #: positions and windows do not overflow together
MIN_CAPABILITY = (8, 0)  #: Ampere: the first with bfloat16 tensor cores and asynchronous copies
_LARGE = dict.fromkeys(((0, 0), (9, 0), (10, 0), (10, 3)), 227 << 10)  # (0, 0): Triton's interpreter, without a limit
_MEDIUM = dict.fromkeys(((8, 0), (8, 7)), 163 << 10)
_SMALL = 99 << 10  #: as on 8.6, 8.9 and 12.0


def usual_shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have on GPUs of a compute capability. No device is asked."""
    return (_LARGE | _MEDIUM).get(capability, _SMALL)


def refusals(problem: Problem, head_dims: range, value_dims: range) -> list[str]:
    """Why no forward kernel in plain Triton serves a problem. Empty: one whose head dims these are may."""
    p, why = problem, []
    if p.device == "cuda" and p.capability < MIN_CAPABILITY:
        why.append(f"needs compute capability 8.0 or newer, this GPU has {p.capability[0]}.{p.capability[1]}")
    why += missing(p.device)
    if p.dtype == torch.float64:
        why.append("float64 is the reference's")
    if p.empty:
        why.append("no queries or no keys")
    for name, dim, dims in (("head", p.head_dim, head_dims), ("value", p.value_dim, value_dims)):
        if dim not in dims:
            why.append(f"{name} dim {dim} is not a multiple of 8 up to {dims[-1]}")
    return why
