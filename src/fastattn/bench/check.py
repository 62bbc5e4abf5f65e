"""Whether an implementation computed the right thing: a sanity check of what is timed, not the test suite."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case
from .implementations import bind_fastattn
from .inputs import Inputs, Part, without_padding

#: Relative errors (norm of the difference over the norm) that bfloat16 stays below.
OUTPUT_LIMIT = 8e-3
GRADIENT_LIMIT = 1.6e-2
MOST_FLOPS = 2e12  #: that the reference may take; larger calls are not checked


def reference(case: Case, x: Inputs, backward: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The reference's output on copies in that dtype; with `backward` also the gradients of q, k and v."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_(backward) for tensor in (x.q, x.k, x.v))
    with warnings.catch_warnings(), torch.set_grad_enabled(backward):
        warnings.simplefilter("ignore")  # that the reference is slow
        out = bind_fastattn(case, x._replace(q=q, k=k, v=v), backend="reference")()
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), x.grad_out.to(dtype))) if backward else (out,)


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the tensors' relative errors; NaN if one is."""
    errors = [((a.to(b.dtype) - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def check_error(error: float, limit: float) -> None:
    """Raises ValueError unless the error is below the limit."""
    if not error < limit:
        raise ValueError(f"wrong result: relative error {error:.2e} against the reference, expected below {limit:.1e}")


@dataclass(frozen=True)
class Expected:
    """What the result of a call has to be."""

    case: Case
    tensors: tuple[Tensor, ...]
    part: Part | None  #: which part of the result is compared; None: all
    limit: float
    how: str

    @staticmethod
    def of(case: Case, x: Inputs, kind: str, part: Part | None) -> Expected:
        """part: compared in float64 on that part alone; None: in float32 on the whole call."""
        gradients = kind in ("backward", "step")
        if part is None:
            found, how = reference(case, x, gradients), "reference"
        else:
            found = reference(*part.of(case, x), gradients, torch.float64)
            how = f"reference in float64, batch entry {part.entry}, K/V head {part.head}"
        limit = GRADIENT_LIMIT if gradients else OUTPUT_LIMIT
        return Expected(case, found[1:] if kind == "backward" else found, part, limit, how)

    def error(self, result: tuple[Tensor, ...]) -> float:
        """The largest relative error of the tensors of a result."""
        result = tuple(without_padding(self.case, x) for x in result)
        return relative_error(self.part.cut(self.case, result) if self.part else result, self.tensors)


def drawn_part(case: Case, seed: int) -> Part:
    """One K/V head of one batch entry, drawn at random."""
    rng = random.Random(f"{seed} {case}")
    return Part(rng.randrange(case.batch), rng.randrange(case.kv_heads))
