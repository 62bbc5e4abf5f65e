"""Problems drawn at random: every backend that accepts one against the naive truth, forward and gradients.

A failure is shrunk to the smallest problem that shows it; keep that one as a case in features.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from cases import BF16, FP16, FP32, FP64, LAYOUTS, Case, errors, make, refusals, run, truth
from features import BROADCASTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

#: decode runs on a CPU only through Triton's interpreter, which has to be on before Triton is imported.
BACKENDS = ("torch", "reference") + ("decode",) * (os.environ.get("FASTATTN_INTERPRET") == "1")
EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "500"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any call at all, small."""

    def rarely(strategy: st.SearchStrategy[Any]) -> Any:
        """Mostly None: with every feature in every call, only the reference would accept any."""
        return draw(strategy) if draw(st.integers(0, 3)) == 3 else None

    batch, kv_heads, group = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # Mostly square or one query: random pairs of lengths would rarely be either.
    kv_len = draw(st.integers(0, 40))
    q_len = draw(st.just(kv_len) | st.just(1) | st.integers(0, 40))
    floats = st.sampled_from([BF16, FP16, FP32, FP64])
    kinds = st.sampled_from(["bool", "additive", "finfo"])
    mask = draw(
        st.sampled_from(["none", "causal"])
        | st.builds("{}:{}".format, kinds, st.sampled_from(BROADCASTS))
        | st.builds("intervals:{}".format, st.sampled_from(["bq", "b1", "1q", "11"]))
        | st.builds("segments:{}".format, st.sampled_from(["p", "pc", "5", "5c", *["3", "3c"] * (q_len == kv_len)]))
    )
    lengths = not mask.startswith("segments")  # which say them themselves
    side = st.integers(-1, 45)
    case = Case(
        batch=batch,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(st.sampled_from([8, 16, 40, 33, 3, 1])),
        value_dim=rarely(st.sampled_from([8, 24, 1])),
        dtype=draw(floats),
        layout=draw(st.sampled_from([name for name in LAYOUTS if batch or name != "expanded"])),
        mask=mask,
        # float64's finfo.min is -inf in float32, and float16's is so small that it only blurs the scores it is added to
        mask_dtype=draw(st.sampled_from([BF16, FP32])) if mask.startswith("finfo") else rarely(floats),
        keep=draw(st.sampled_from([0.7, 0.1, 1.0, 0.0])),
        sinks=rarely(floats),
        window=rarely(st.tuples(side, side)),
        softcap=rarely(st.sampled_from([0.5, 3.0, 50.0])),
        scale=rarely(st.sampled_from([0.0, 0.01, 0.2, -0.1])),
        q_lengths=rarely(st.tuples(*[st.integers(-2, q_len + 2)] * batch)) if lengths else None,
        kv_lengths=rarely(st.tuples(*[st.integers(-2, kv_len + 2)] * batch)) if lengths else None,
        return_lse=draw(st.integers(0, 3)) == 3,
    )
    grads = draw(st.just("") | st.sets(st.sampled_from("qkv")) | st.sets(st.sampled_from(case.leaves)))
    return case.but(grads="".join(name for name in case.leaves if name in grads))


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=cases(), seed_of_data=st.integers(0, 2**32 - 1))
def test_every_backend_that_accepts_a_problem(case: Case, seed_of_data: int) -> None:
    inputs = make(case, seed=seed_of_data)
    want = truth(inputs)
    # Rounding errors of a handful of numbers do not average out; float32 has room for that within its tolerance.
    allowance = 1 if case.dtype in (FP32, FP64) else 4
    for backend in BACKENDS:
        if refusals(inputs, backend):
            assert backend != "reference"
            continue
        found = errors(case, inputs, run(inputs, backend), want)
        assert max(found.values()) <= allowance, f"{backend} on {case}: shares of the accepted error: {found}"
