"""Gradients of gradients, by autograd through the reference: no kernel has them.

Slow, and memory O(Sq x Skv): for gradient penalties and the like.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..call import LETTERS, Call, Gradients, Problem


def gradients(call: Call, grad_out: Tensor, grads: Gradients) -> tuple[Tensor | None, Gradients]:
    """The gradients of grad_out, None where it needs none, and of a call's inputs; `grads` are those of the call's own
    gradients, None for one that nobody differentiated.

    Differentiable itself where gradients are enabled.
    """
    problem, again = Problem.of(call), torch.is_grad_enabled()
    if problem.empty:  # nothing depends on anything
        zeros = {name: torch.zeros_like(getattr(call, name)) for name, x in LETTERS.items() if x in call.grads}
        return (torch.zeros_like(grad_out) if grad_out.requires_grad else None), Gradients(**zeros)
    with torch.enable_grad():
        # Each input by itself, also where one tensor is several of them.
        inputs = {
            name: x.view_as(x)
            for name in Gradients._fields
            if LETTERS[name] in call.grads and (x := getattr(call, name)) is not None
        }
        out, _ = reference.forward(problem, call._replace(**inputs))
        first = torch.autograd.grad(out, list(inputs.values()), grad_out, create_graph=True)
        pairs = [(one, grad) for name, one in zip(inputs, first) if (grad := getattr(grads, name)) is not None]
        wanted = [*inputs.values(), *([grad_out] if grad_out.requires_grad else [])]
        found = torch.autograd.grad(
            [one for one, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    of_grad_out = found[-1] if grad_out.requires_grad else None
    return of_grad_out, Gradients(**dict(zip(inputs, found)))
