"""The portable backward alone, after the reference's forward: what a case's gradients are."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradient_bounds
import torch
from cases import Case, Inputs, assert_right, make, poison_free_memory, reference_results
from torch import Tensor

from fastattn import reference
from fastattn.backends.triton.backward import launch
from fastattn.call import Call, Problem
from fastattn.validation import Arguments, validated


def call_of(inputs: Inputs) -> Call:
    """The call, with the gradients that the case asks for."""
    options = dict(inputs.options)
    scale = options.pop("scale")
    with torch.no_grad():
        found = validated(Arguments(inputs.q, inputs.k, inputs.v, **options), scale)
    tensors = {name: x.detach() for name, x in found._asdict().items() if isinstance(x, Tensor)}
    return found._replace(**tensors, grads="".join(name for name in "qkvms" if name in inputs.leaves))


def gradients(inputs: Inputs, kernel: Any = None, call: Call | None = None) -> dict[str, Tensor]:
    """ "dq" and so on, each in its input's shape."""
    call = call_of(inputs) if call is None else call
    p = Problem.of(call)
    assert launch.reasons(p) == []
    out, lse = reference.forward(p, call)
    kernel = launch.bind(p, call) if kernel is None else kernel
    poison_free_memory(inputs)
    found = kernel.backward(call, out, lse, inputs.grad_out, inputs.grad_lse if p.return_lse else None)
    named = dict(zip("qkvms", found, strict=True))
    scale = inputs.options["scale"]
    if scale is not None and scale <= 0 and named["q"] is not None:  # a call has a positive scale, and another q
        named["q"] = named["q"] * (-1.0 if scale else 0.0)
    assert {name for name, x in named.items() if x is not None} == set(inputs.leaves)
    return {f"d{name}": named[name].reshape(x.shape) for name, x in inputs.leaves.items()}


def gradients_of_rounded(inputs: Inputs) -> dict[str, Tensor]:
    """What `gradients` would be in float64, but for the output that the backward is given, which is rounded: see
    `gradient_bounds`."""
    call = call_of(inputs)
    out, _ = reference.forward(Problem.of(call), call)
    exact = reference_results(dataclasses.replace(inputs, leaves={}))["out"]
    shift = gradient_bounds.shift(out, exact, inputs.grad_out, inputs.seen.any(-1))
    grad_lse = inputs.grad_lse.double() if inputs.options["return_lse"] else torch.zeros_like(shift)
    with_lse = inputs.options | {"return_lse": True}
    found = reference_results(dataclasses.replace(inputs, options=with_lse, grad_lse=grad_lse - shift))
    return {name: x for name, x in found.items() if name.startswith("d")}


def check(case: Case, device: str, seed: int | None = None) -> None:
    """Asserts that all gradients of the case that there can be are those of `naive`."""
    case = case.but(grads=case.grads or case.leaves)
    inputs = make(case, device, seed)
    want = reference_results(inputs)
    assert_right(case, inputs, gradients(inputs), {name: x for name, x in want.items() if name.startswith("d")})
