"""The launch of `combine_kernel`, after any kernel that divides the keys of a row among programs."""

from __future__ import annotations

import torch

from ....call import Problem
from ..binaries.launcher import BinaryLauncher, launcher_of
from ..binaries.triton_kernel import NamedKernel
from ..launcher import Launcher, overlaps
from .launch_config import MAX_SPLITS, block_of
from .shapes import rows

_COMBINE = NamedKernel(f"{__package__}.combine", "combine_kernel")
_ALIGNED = 3  #: tensors of which the compiler is told where they begin: all but the sinks
_MOST_COLUMNS, _FEWER = 256, 128  #: of a program; wider rows are many programs
_AT_ONCE = 4096  #: numbers read at a time, so that they fill 32 registers a thread


def combination(p: Problem, splits: int, device: torch.device) -> BinaryLauncher | Launcher:
    """Takes what the splits left, the output, the log-sum-exp or None, and the sinks or None."""
    columns = block_of(p.value_dim)
    columns = columns if columns <= _MOST_COLUMNS else _FEWER
    pdl = overlaps(p.capability)
    return launcher_of(
        _COMBINE,
        (p.batch * p.kv_heads, rows(p), -(-p.value_dim // columns)),
        device,
        p.capability,
        (p.q_len, splits),
        (p.kv_heads, p.group, p.value_dim, columns, MAX_SPLITS, _AT_ONCE // columns, pdl),
        _ALIGNED,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
