"""How the product kernels are launched, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...shape_cache import cached

MANY_TOKENS = 64  #: from so many on they fill a GPU however they are dealt to programs


@dataclass(frozen=True, slots=True)
class Launch:
    """Of the product of one row."""

    block_n: int  #: output columns of a program
    block_k: int  #: of the inner dim, in one step
    warps: int


@cached(1 << 10, "launches")
def choose(n: int, k: int, gated: bool, dtype: torch.dtype) -> Launch:
    """The launch for K numbers times `[N, K]`, or `[2 N, K]` if gated.

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
