"""Launching a Triton kernel without going through its binder every time.

Triton binds, specialises and looks up each launch in Python: 20 us and more for a kernel of 40 arguments. What it
returns is the compiled kernel, and that can be launched again at a third of the cost as long as everything that Triton
specialises on is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memo import Memo

_compiled: Memo[Any, Any] = Memo(1 << 12)
_INT32 = 1 << 31


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    floats: tuple[float | None, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Launches `kernel(*tensors, *integers, *floats, *constants)` on torch's current stream of the tensors' device.

    The kernel must take its arguments in that order and declare every integer `do_not_specialize`; integers must not
    be negative. constants: its constexprs. options: num_warps and the like.
    """
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*tensors, *integers, *floats, *constants, **options)
        return
    if device.index != torch.cuda.current_device():  # Triton launches there
        with torch.cuda.device(device):
            return launch(kernel, grid, device, tensors, integers, floats, constants, **options)
    # All that Triton looks at: types, None, the alignment of pointers, whether an integer fits 32 bits.
    pointers = tuple([None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
    name = (kernel, grid, device.index, pointers, tuple([x is None for x in floats]), constants, *options.values())
    run = _compiled.get(name)
    if run is None or max(integers) >= _INT32:
        compiled = kernel[grid](*tensors, *integers, *floats, *constants, **options)
        if max(integers) < _INT32 and compiled is not None:
            _compiled[name] = compiled[(*grid, 1, 1)[:3]]
        return
    run(*tensors, *integers, *floats, *constants, stream=torch._C._cuda_getCurrentRawStream(device.index))
