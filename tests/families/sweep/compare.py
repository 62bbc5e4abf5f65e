"""When two results are the same: what eager's own rounding explains is no difference."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  #: of the largest value of the tensor compared
ROUNDING = 10  #: how many times eager's own error in float32 is still rounding
DOUBLE = 1e-8  #: the same as TOLERANCE in float64
LARGE = 0.3  #: no rounding is as large as this, whatever float64 says

Result = dict[str, Tensor]
#: Parts of an output that are no result: state, and attention weights, which only eager has.
LEFT_OUT = re.compile(r"past_key_values|^cache|cache$|cache_params|^loss$|^mems$|attentions$|_buckets")


def floats(value: Any, prefix: str = "") -> Result:
    """Every floating tensor in a model's output, by its path; caches are left out."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel():
            return {}
        return {prefix: value.detach() if value.dtype == torch.float64 else value.detach().float()}
    found: Result = {}
    if isinstance(value, dict):
        for name, part in value.items():
            if not LEFT_OUT.search(str(name)):
                found |= floats(part, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            found |= floats(part, f"{prefix}.{i}")
    return found


def difference(expected: Result, found: Result) -> tuple[float, str]:
    """The largest error of any tensor, relative to that tensor's largest value, and the tensor's name.

    What eager leaves as NaN is not compared; a NaN or infinity that eager does not have counts as infinite.
    """
    if "gradients" in expected:
        return _gradient_difference(expected, found)
    worst, where = 0.0, ""
    for name, right in expected.items():
        other = found.get(name)
        if other is None or other.shape != right.shape:
            shape = None if other is None else list(other.shape)
            return float("inf"), f"{name}: {list(right.shape)} became {shape}"
        known = ~right.isnan()
        right, other = right[known], other[known]
        same = right == other
        error = (right - other).abs().masked_fill(same, 0).nan_to_num(float("inf"), float("inf"), float("inf"))
        finite = right[right.isfinite()]
        finite = finite[finite.abs() < 1e30]  # a mask's value is no scale
        scale = float(finite.abs().max()) if finite.numel() else 1.0
        relative = float(error.max()) / max(scale, 1e-6) if error.numel() else 0.0
        if relative > worst:
            worst, where = relative, name
    return worst, where


def _gradient_difference(expected: Result, found: Result) -> tuple[float, str]:
    """By norms; a parameter whose gradient is next to nothing is measured by the largest of all."""
    names = [name for name in expected if name != "gradients"]
    largest = max((float(expected[name].norm()) for name in names), default=1.0)
    worst, where = 0.0, ""
    for name in names:
        other = found.get(name)
        if other is None:
            if float(expected[name].norm()) > 1e-6 * largest:
                return float("inf"), f"{name} has no gradient"
            continue
        scale = max(float(expected[name].norm()), 1e-2 * largest, 1e-12)
        error = float((expected[name] - other).norm()) / scale
        if not error <= worst:
            worst, where = error if error == error else float("inf"), name
    return worst, where


def rounding(run: Any, model: nn.Module, expected: Result) -> float:
    """How far eager is from itself when its weights move by float32's rounding: what no order of sums can avoid."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 2e-7 * torch.randn(parameter.shape, generator=generator))
    return difference(expected, run(moved))[0]


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 and takes its inputs in float32."""

    def widen(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wide = {n: v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for n, v in kwargs.items()}
        return args, wide

    wide = copy.deepcopy(model).double()
    wide.register_forward_pre_hook(widen, with_kwargs=True)
    return wide
