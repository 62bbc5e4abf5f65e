"""Trials of modules on random numbers: what they are tried with, and when two results are equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.triton.launcher import native

_LONGEST = 1 << 16  #: entries of a row that one program of liger-kernel's takes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Signature = tuple[Any, ...]


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether liger-kernel takes the tensors as they are. Checked in each call, because models are moved and cast."""
    first = tensors[0]
    if first.dtype not in _DTYPES or not native(first.device.type):
        return False
    return all(
        type(x) in (Tensor, nn.Parameter) and x.dtype == first.dtype and x.device == first.device for x in tensors
    ) and (first.shape[-1] <= _LONGEST)


def signature_of(module: nn.Module) -> Signature:
    """What modules that compute the same have in common: class, settings, kinds of children. Each is tried once."""
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, type(None))) and name != "layer_idx"
    )
    return type(module), settings, tuple((name, type(child)) for name, child in module.named_children())


def random(shape: Sequence[int], like: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device, on the device and of the dtype of a tensor.

    Of bfloat16 for a tensor of a quantized dtype, whose layer takes other inputs than its weight.
    """
    dtype = like.dtype if like.dtype in (*_DTYPES, torch.float64) else torch.bfloat16
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(like.device, dtype)


def is_differentiable(module: nn.Module) -> bool:
    """Whether gradients can be computed through a module: not through weights that were made in inference mode."""
    return not any(parameter.is_inference() for parameter in module.parameters())


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of a function's results, with respect to its argument."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(x).float().sum(), x)
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    tolerance = 10 * torch.finfo(expected.dtype).eps
    return bool(torch.linalg.vector_norm((found - expected).float()) <= tolerance * expected.float().norm())


def equal(found: Any, expected: Tensor) -> bool:
    """Whether a result is the expected one, bit for bit."""
    return (
        isinstance(found, Tensor)
        and found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found, expected)
    )
