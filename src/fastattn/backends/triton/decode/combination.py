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
_WIDE = NamedKernel(f"{__package__}.combine_wide", "combine_wide_kernel")
_ALIGNED = 3  #: tensors of which the compiler is told where they begin: all but the sinks
_MOST_COLUMNS, _FEWER = 256, 128  #: of a program; wider rows are many programs
_AT_ONCE = 4096  #: numbers read at a time, so that they fill 32 registers a thread


def combination(p: Problem, splits: int, device: torch.device, columns: int = 0) -> BinaryLauncher | Launcher:
    """Takes what the splits left, the output, the log-sum-exp or None, and the sinks or None.

    columns: of a program of the kernel for wide heads, a power of two; 0: the other kernel.
    """
    pdl = overlaps(p.capability)
    constants: tuple[int, ...]
    if columns:
        kernel, constants = _WIDE, (columns, _AT_ONCE // columns)
    else:
        columns = block_of(p.value_dim)
        columns = columns if columns <= _MOST_COLUMNS else _FEWER
        kernel, constants = _COMBINE, (columns, MAX_SPLITS, _AT_ONCE // columns)
    return launcher_of(
        kernel,
        (p.batch * p.kv_heads, rows(p), -(-p.value_dim // columns)),
        device,
        p.capability,
        (p.q_len, splits),
        (p.kv_heads, p.group, p.value_dim, *constants, pdl),
        _ALIGNED,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
