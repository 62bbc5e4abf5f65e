"""Sums of partial results: see `sums_kernel.py`."""

from __future__ import annotations

from typing import Any

import torch

from .binaries.launcher import launcher_of
from .binaries.triton_kernel import NamedKernel

_KERNEL = NamedKernel(f"{__package__}.sums_kernel", "sum_kernel")


def launcher_of_sum(count: int, pieces: int, device: torch.device, capability: tuple[int, int]) -> Any:
    """The launcher of a sum of `pieces` pieces of `count` numbers. Its tensors: the pieces, float32 [pieces, count];
    the sums [count], of any floating dtype."""
    block, step = (512, 2) if count >= 1 << 16 else (64, 32) if count >= 1 << 10 else (16, 128)
    return launcher_of(_KERNEL, (-(-count // block),), device, capability, (count, pieces), (block, step), num_warps=4)
