"""RMS norms that liger-kernel can compute: recognised by comparing a module with three formulas, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .trial import close, equal, fits_kernels, gradient, random


@dataclass(frozen=True)
class Norm:
    """How a norm multiplies by its weight, in liger-kernel's terms."""

    offset: float  #: added to the weight
    casting: str  #: "llama": rounds before the multiplication, "gemma": after it
    formula: Callable[[Tensor, Tensor], Tensor]  #: of the normalised float32 rows and the weight, in the weight's dtype


NORMS = (
    Norm(0.0, "llama", lambda x, weight: weight * x.to(weight.dtype)),
    Norm(0.0, "gemma", lambda x, weight: (weight * x).to(weight.dtype)),  # OLMo 2, gpt-oss
    Norm(1.0, "gemma", lambda x, weight: (x * (1.0 + weight.float())).to(weight.dtype)),
)
_EPS = ("variance_epsilon", "eps")  #: attributes
_SCALES = (1e-3, 1.0, 100.0, 3e4)  #: of the numbers tried: the smallest make eps visible, the largest bounds


def recognise(module: Any) -> tuple[Norm, str] | None:
    """Which norm a module is, and its attribute for eps; None if it is none of `NORMS`."""
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if (
        eps is None
        or weight is None
        or len(parameters) != 1
        or weight.dim() != 1
        or any(True for _ in module.children())
    ):
        return None
    if type(module).__module__.startswith("torch.") or len(signature(module.forward).parameters) != 1:
        return None  # torch's own norm is one kernel already; norms with a second input compute something else
    try:
        return next(((norm, eps) for norm in NORMS if _computes(module, norm, getattr(module, eps))), None)
    except Exception:  # a module that cannot be copied, or takes other inputs
        return None


def _computes(module: nn.Module, norm: Norm, eps: float) -> bool:
    # In bfloat16, where it shows what is rounded when, and with a weight that is not all ones.
    with torch.inference_mode(False):
        tried: Any = copy.deepcopy(module).to(torch.bfloat16).requires_grad_(False)
        tried.weight.copy_(random(tried.weight.shape, tried.weight, seed=1))

    def formula(x: Tensor) -> Tensor:
        rows = x.float()
        return norm.formula(rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps), tried.weight)

    for training in (False, True):
        tried.train(training)
        for scale in _SCALES:
            x = random((3, tried.weight.shape[0]), tried.weight, scale)
            if not equal(tried.forward(x), formula(x)):
                return False
            if not close(gradient(tried.forward, x), gradient(formula, x)):
                return False
    return True


def fused_norm(function: Any, norm: Norm, eps: str) -> Callable[..., Tensor]:
    """A forward that computes the norm with liger-kernel's function."""

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight: Any = self.weight
        if not fits_kernels(hidden_states, weight):
            return type(self).forward(self, hidden_states)
        # Not in place: behind a residual connection the incoming gradient is used elsewhere as well.
        found: Tensor = function.apply(hidden_states, weight, getattr(self, eps), norm.offset, norm.casting, False)
        return found

    return forward
