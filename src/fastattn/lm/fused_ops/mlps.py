"""Gated MLPs that liger-kernel can compute: down(act(gate(x)) * up(x)), recognised by comparing a module with it."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..._compat.transformers import activation
from ..module_hooks import without_hooks
from .trial import close, equal, fits_kernels, gradient, is_differentiable, random

#: The largest gates tried: some families clamp them, at 7 or 10. The last would overflow in float16.
_SIZES = (1.0, 150.0, 3e4)
_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def gate_function(kernels: Any, module: Any) -> Any:
    """liger-kernel's function for the gate of a module; None if the module is no such MLP or has another activation."""
    if {name for name, _ in module.named_children()} != _CHILDREN or len(signature(module.forward).parameters) != 1:
        return None
    if type(module.act_fn) is type(activation("silu")):
        function = kernels.LigerSiLUMulFunction
    elif type(module.act_fn) is type(activation("gelu_pytorch_tanh")):
        function = kernels.LigerGELUMulFunction
    else:
        return None
    try:
        return function if _is_gated_mlp(module) else None
    except Exception:  # projections of another kind, which take other inputs
        return None


def _is_gated_mlp(module: Any) -> bool:
    tried = without_hooks(module)
    weight = tried.gate_proj.weight

    def formula(x: Tensor) -> Tensor:
        found: Tensor = tried.down_proj(tried.act_fn(tried.gate_proj(x)) * tried.up_proj(x))
        return found

    with torch.no_grad():
        unit = random((3, getattr(tried.gate_proj, "in_features", weight.shape[-1])), weight)
        unit = unit / tried.gate_proj(unit).abs().max()
    for training in (False, True):
        tried.training = training
        for size in _SIZES if unit.dtype != torch.float16 else _SIZES[:-1]:
            x = unit * size
            with torch.no_grad():
                if not equal(tried.forward(x), formula(x)):
                    return False
            if is_differentiable(module) and not close(gradient(tried.forward, x), gradient(formula, x)):
                return False
    return True


def fused_mlp(function: Any) -> Callable[..., Tensor]:
    """A forward that computes the activation and the product with liger-kernel's function."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = function.apply(gate, up) if fits_kernels(gate, up) else self.act_fn(gate) * up
        found: Tensor = self.down_proj(product)
        return found

    return forward
