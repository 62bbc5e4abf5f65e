"""What the Gluon kernels for Hopper have in common before one is launched: who may call them, and their numbers."""

from __future__ import annotations

import torch

from ....call import Problem
from ..launcher import INSTALL, has_triton
from .binary import CAPABILITY

OPEN = 1 << 29  #: a side of a window that hides nothing; positions and it do not overflow together
MOST_KEYS = 1 << 28  #: nor do lengths
NARROW = 256  #: the largest head dim and value dim of the forward in this folder
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  #: in Triton's words


def refusals(p: Problem) -> list[str]:
    """Why no Gluon kernel serves the problem. Empty: one whose head dims and masks these are may."""
    why = []
    if p.device != "cuda" or p.capability != CAPABILITY:
        found = f"{p.capability[0]}.{p.capability[1]}" if p.device == "cuda" else f"a {p.device}"
        why.append(f"is made for compute capability 9.0, this device is {found}")
    if not has_triton():
        why.append(INSTALL)
    if p.dtype not in DTYPES:
        why.append(f"takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}")
    if p.empty:
        why.append("no queries or no keys")
    if max(p.q_len, p.kv_len) > MOST_KEYS:
        why.append(f"takes up to {MOST_KEYS} tokens")
    return why


def is_wide(p: Problem) -> bool:
    """True for head dims, or value dims, of the forward in `hopper_wide`."""
    return max(p.head_dim, p.value_dim) > NARROW


def sides(p: Problem) -> tuple[int, int]:
    """A band's two sides, as the kernels take them."""
    left, right = (OPEN if side < 0 else min(side, OPEN) for side in (p.left, p.right))
    return left, right
