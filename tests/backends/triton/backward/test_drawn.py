"""The portable backward on problems drawn at random."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("hypothesis")

from cases import BF16, FP16, Case, assert_right, make, reference_results
from drawn import Drawn, inputs_of, problems
from drawn_checks import hold
from hypothesis import assume
from portable_backward import call_of, gradients, gradients_of_rounded

from fastattn import reference
from fastattn.backends.triton.backward import launch
from fastattn.call import Problem


def compare(drawn: Drawn, device: str) -> None:
    assume(drawn.case.grads)
    inputs = inputs_of(drawn, device)
    assume(not launch.reasons(Problem.of(call_of(inputs))))
    assert_right(drawn.case, inputs, gradients(inputs), gradients_of_rounded(inputs))


@pytest.mark.slow
def test_drawn(device: str, seed: int) -> None:
    """Longer ones, and more of them, on a GPU."""
    few = device == "cpu"
    strategy = problems(longest=36, rows=32, least=1) if few else problems(longest=300, rows=1200, least=1)
    hold(strategy, partial(compare, device=device), 5 if few else 60, seed)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_only_what_a_rounded_output_does_to_delta_counts_as_true(dtype: torch.dtype, return_lse: bool) -> None:
    """What the drawn problems are held against is the formula in float64, whose delta is of the rounded output."""
    case = Case(
        batch=1, q_heads=2, kv_heads=2, q_len=5, kv_len=3, head_dim=8, mask="bool:b1qk", dtype=dtype, grads="qkv",
        return_lse=return_lse,
    )  # fmt: skip
    inputs = make(case)
    q, k, v = (x.double() for x in inputs.clean)
    call, grad_out, grad_lse = call_of(inputs), inputs.grad_out.double(), inputs.grad_lse.double()
    out, _ = reference.forward(Problem.of(call), call)
    p = (q @ k.mT / 8**0.5).masked_fill(~inputs.seen, -torch.inf).softmax(-1).nan_to_num()
    delta = (grad_out * out.double()).sum(-1)
    ds = p * (grad_out @ v.mT - delta[..., None] + (grad_lse[..., None] if return_lse else 0.0)) / 8**0.5
    found, exact = gradients_of_rounded(inputs), reference_results(inputs)
    for name, want in (("dq", ds @ k), ("dk", ds.mT @ q), ("dv", p.mT @ grad_out)):
        torch.testing.assert_close(found[name], want, atol=1e-9, rtol=1e-9)
    assert (found["dq"] - exact["dq"]).abs().max() > 1e-5
