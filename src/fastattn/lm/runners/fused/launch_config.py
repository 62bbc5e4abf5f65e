"""Launch configurations of the GEMV kernel, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ....shape_cache import cached

MANY_TOKENS = 64  #: from this number on tokens fill a GPU however they are distributed over programs


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch configuration of `gemm_kernels.gemv_kernel`."""

    block_n: int  #: output columns per program
    block_k: int  #: entries of the inner dim per step
    warps: int


@cached(1 << 10, "launches")
def choose_launch(n: int, k: int, gated: bool, dtype: torch.dtype) -> Launch:
    """The launch configuration for a vector `[K]` and a weight `[N, K]`, or `[2 N, K]` if gated.

    Measured on an H100 over the shapes of Llama-3.1-8B (TB/s, cuBLAS in brackets): 2.87 (2.39) for 6144 x 4096, 2.58
    (2.11) for 4096 x 4096, 2.99 (2.77) for 2 x 14336 x 4096, 2.84 (2.59) for 4096 x 14336, 3.14 (2.77) for 128256 x
    4096.
    """
    if gated:
        launch = Launch(block_n=1, block_k=2048, warps=8)
    elif n <= 4096:
        launch = Launch(block_n=4, block_k=1024, warps=2)
    elif n <= 16384:
        launch = Launch(block_n=8, block_k=512, warps=2)
    else:
        launch = Launch(block_n=4, block_k=1024, warps=4)
    return replace(launch, block_k=launch.block_k // 2) if dtype == torch.float32 else launch
