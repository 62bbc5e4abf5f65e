"""What a GPU has, what it must have for kernels in plain Triton, and which calls none of them takes. Does not import
triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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
_SMS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (10, 3): 148, (12, 0): 170}


def usual_shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may have on GPUs of a compute capability. No device is asked."""
    return (_LARGE | _MEDIUM).get(capability, _SMALL)


def usual_sm_count(capability: tuple[int, int]) -> int:
    """Streaming multiprocessors of the GPU that is most common of a compute capability. No device is asked."""
    return _SMS.get(capability, 108)


def refusals(problem: Problem, head_dims: range, value_dims: range) -> list[str]:
    """Why no kernel in plain Triton serves a problem. Empty: one whose head dims these are may."""
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


def many_queries(problem: Problem, fits: Callable[[Problem], bool]) -> list[str]:
    """Why the kernels for many queries, forward or backward, do not serve a problem. Empty: they do. fits: whether the
    smallest launch of theirs has room in the GPU's shared memory."""
    why = refusals(problem, HEAD_DIMS, VALUE_DIMS)
    if max(problem.q_len, problem.kv_len) > MOST_TOKENS:
        why.append(f"takes up to {MOST_TOKENS} tokens")
    if not why and not fits(problem):
        why.append("head and value dims take more shared memory than a program may have on this GPU")
    return why


@cache
def sm_count(index: int) -> int:
    """Streaming multiprocessors of CUDA device `index`. Without a GPU (Triton's interpreter): 4, so that it splits."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 4


@cache
def shared_memory(index: int) -> int | None:
    """Bytes of shared memory that a program may have on CUDA device `index`; None without a GPU, or one that torch
    does not ask."""
    if index < 0:
        return None
    return getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", None)
