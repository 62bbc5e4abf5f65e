"""The cuDNN backend on problems drawn at random, its plans computed by torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, make, refusals, run
from drawn import Drawn, problems
from drawn_checks import EXAMPLES, hold, wrong
from emulated import EmulatedPlans, emulate

SHARE = 10  #: of so many problems one is computed here
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
BASE = Case(dtype=BF16, q_len=9, kv_len=13, head_dim=16)

KEPT = (
    Drawn(BASE.but(mask="causal", grads="qkv", sinks=FP32)),
    Drawn(BASE.but(mask="causal", kv_lengths=(0, 13), q_lengths=(9, 0), grads="qkv", return_lse=True)),
    Drawn(BASE.but(kv_len=9, mask="segments:3c", sinks=FP32, grads="qkvs"), layouts=("sliced", "cache", "misaligned")),
    Drawn(BASE.but(mask="additive:1h1k", kv_lengths=(13, 0), grads="qkvm"), layouts=("bshd", "strided", "one head")),
    Drawn(BASE.but(window=(3, 1), dtype=FP16, return_lse=True), layouts=("shifted", "shifted", "bhsd")),
    Drawn(BASE.but(q_len=1, mask="intervals:b1", grads="k"), layouts=("bhsd", "overlapping", "bhsd")),
)


def meant_for_cudnn(drawn: Drawn) -> Drawn:
    """The same, within what cuDNN serves."""
    c = drawn.case
    return dataclasses.replace(
        drawn,
        case=c.but(
            dtype=c.dtype if c.dtype in (BF16, FP16) else BF16,
            head_dim=c.head_dim if c.head_dim % 8 == 0 else 24,
            value_dim=c.value_dim and 8 * (c.value_dim // 8 + 1),
            mask_dtype=FP32 if c.mask_dtype == FP64 else c.mask_dtype,
            softcap=None,
            # See test_the_log_sum_exp_of_a_row_under_nothing_but_finfo_min.
            return_lse=c.return_lse and not c.mask.startswith("finfo"),
        ),
    )


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The kernels for offsets, sinks and masks are Triton's."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("Triton runs natively here: with real plans the tests on the GPU say more")
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm{c[0]}{c[1]}")
@pytest.mark.parametrize("plan", ["any length", "larger", "exact"])
def test_problems(plan: str, capability: tuple[int, int], seed: int, interpreted: pytest.MonkeyPatch) -> None:
    cache = emulate(interpreted, capability)
    cache.static, cache.larger = plan == "static", plan == "larger"
    served = []

    def check(drawn: Drawn) -> None:
        served.append(len(cache.asked))
        # cuDNN is not asked how it rounds: what is looked for here is what lies in the wrong place.
        found = wrong(drawn, ("cudnn",), "cpu")
        assert not found, f"{drawn.case}: {found}"

    strategy = problems(longest=60, least=1).map(meant_for_cudnn)
    hold(strategy, check, EXAMPLES // SHARE // (3 * len(CAPABILITIES)), seed, KEPT)
    assert len(set(served)) * 3 > len(served), "plans were asked for"


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the bias is clamped to -1e38, and so is the log-sum-exp")
def test_the_log_sum_exp_of_a_row_under_nothing_but_finfo_min(interpreted: pytest.MonkeyPatch) -> None:
    emulate(interpreted)
    drawn = Drawn(BASE.but(q_len=2, mask="finfo:b1qk", mask_dtype=FP32, keep=0.0, return_lse=True))
    assert not wrong(drawn, ("cudnn",), "cpu")


def test_the_emulation_notices_what_it_is_for(interpreted: pytest.MonkeyPatch) -> None:
    """What is unaligned, longer than declared, or beyond the memory: cuDNN would say nothing."""
    cache: EmulatedPlans = emulate(interpreted)
    inputs = make(BASE.but(mask="causal", grads="qkv"), seed=1)
    assert not refusals(inputs, "cudnn")
    run(inputs, "cudnn")
    forward_key, backward_key = cache.asked
    assert (forward_key.direction, backward_key.direction) == ("forward", "backward")
    plan = cache.get(forward_key)
    rows = forward_key.operands[0].dims[0]
    operands = {
        operand.role: torch.zeros(operand.dims, dtype=operand.dtype)
        if operand.role.startswith(("ragged_", "seq_", "scale"))
        else torch.zeros(1 << 12, dtype=operand.dtype)
        for operand in forward_key.operands
    }
    operands["k"] = operands["k"].view(1, 2, -1, 16)
    plan.execute(operands)
    operands["seq_q"].fill_(3)
    operands["seq_kv"].fill_(5)
    plan.execute(operands)
    operands["ragged_k"].fill_(1)
    with pytest.raises(AssertionError, match="k is not aligned"):
        plan.execute(operands)
    operands["ragged_k"].fill_(1 << 12)
    with pytest.raises(RuntimeError, match="out of bounds"):
        plan.execute(operands)
    operands["ragged_k"].zero_()
    operands["seq_kv"][rows - 1] = 1 << 15
    with pytest.raises(AssertionError, match="longer than declared"):
        plan.execute(operands)
