"""Runs and checks problems drawn at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
from cases import FP32, FP64, errors, reference_results, refusals
from drawn import Drawn, another, inputs_of, results
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

FUZZING = "FASTATTN_EXAMPLES" in os.environ

EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "2000"))

PHASES = [Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * (os.environ.get("FASTATTN_SHRINK") != "0")

SHARDS = 4  #: tests among which the problems are divided, for as many processes as pytest-xdist has

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def hold(
    strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int, seed: int, kept: Sequence[Any] = ()
) -> None:
    """Draws problems and checks each, the kept ones first."""

    @hypothesis.settings(
        max_examples=max(1, examples),
        phases=PHASES,
        deadline=None,
        suppress_health_check=SLOW,
        # Read and written while fuzzing only: the suite does not depend on what was run before it.
        **({} if FUZZING else {"database": None}),
    )
    @given(drawn=strategy)
    def holds(drawn: Any) -> None:
        check(drawn)

    for drawn in kept:
        holds = hypothesis.example(drawn=drawn)(holds)
    (holds if FUZZING else hypothesis.seed(seed)(holds))()


def wrong(drawn: Drawn, backends: Sequence[str], device: str) -> list[str]:
    """What any of the backends gets wrong, in a first call and in one like it."""
    # Rounding errors of a handful of numbers do not average out; float32 has room for that within its tolerance.
    allowance = 1 if drawn.case.dtype in (FP32, FP64) else 4
    found = []
    for turn, one in (("first", drawn), ("second", another(drawn))):
        inputs = inputs_of(one, device)
        want = reference_results(inputs)
        for backend in backends:
            if refusals(inputs, backend):
                assert backend != "reference"
                continue
            shares = errors(one.case, inputs, results(one, inputs, backend), want)
            if not max(shares.values()) <= allowance:
                found.append(f"{backend}, {turn} call: shares of the accepted error: {shares}")
    return found
