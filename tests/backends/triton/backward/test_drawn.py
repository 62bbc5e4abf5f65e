"""The portable backward on problems drawn at random."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from cases import errors, reference_results
from drawn import Drawn, inputs_of, problems
from hypothesis import HealthCheck, assume, given, settings
from portable_backward import call_of, gradients

from fastattn.backends.triton.backward import launch
from fastattn.call import Problem


def compare(drawn: Drawn, device: str) -> None:
    assume(drawn.case.grads)
    inputs = inputs_of(drawn, device)
    assume(not launch.reasons(Problem.of(call_of(inputs))))
    want = reference_results(inputs)
    want = {name: x for name, x in want.items() if name.startswith("d")}
    # delta is found from a rounded output: with few numbers a row the error of one is not averaged away.
    found = errors(drawn.case, inputs, gradients(inputs), want)
    assert max(found.values()) <= 2, found


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=problems(longest=36, rows=32, least=1))
def test_interpreted(drawn: Drawn, device: str) -> None:
    if device != "cpu":
        pytest.skip("see the next test")
    compare(drawn, device)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=problems(longest=300, rows=1200, least=1))
def test_native(drawn: Drawn, device: str) -> None:
    if device != "cuda":
        pytest.skip("the interpreter takes its time")
    compare(drawn, device)
