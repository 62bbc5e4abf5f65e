"""torch's own kernels: what they must serve, that they serve it exactly, and what they must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, assert_right, check, make, reference_results, refusals, run
from features import FEATURES

import fastattn
from fastattn._compat import sdpa as torchs
from fastattn.backends import torch as torch_sdpa


def _served(case: Case) -> bool:
    empty = 0 in (case.batch, case.q_len, case.kv_len)
    return case.softcap is None and case.sinks is None and not case.return_lse and "m" not in case.grads and not empty


SERVED = [name for name, case in FEATURES.items() if _served(case)]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_every_feature_served(name: str, dtype: torch.dtype) -> None:
    case = FEATURES[name].but(dtype=dtype)
    check(case, "torch")
    check(case.but(grads="qkv"), "torch")


@pytest.mark.parametrize("name", FEATURES)
def test_refuses_what_it_cannot_do_and_nothing_else(name: str) -> None:
    for case in (FEATURES[name], FEATURES[name].but(grads="q")):
        assert bool(refusals(make(case), "torch")) != _served(case)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": FP64}, "float64"),
        ({"softcap": 1.0}, "softcap"),
        ({"sinks": FP32}, "sinks"),
        ({"return_lse": True}, "log-sum-exp"),
        ({"mask": "additive:qk", "grads": "m"}, "gradient for the mask"),
        ({"kv_len": 0}, "no keys"),
    ],
    ids=str,
)
def test_refusals_say_why(change: dict[str, Any], words: str) -> None:
    (why,) = refusals(make(Case(**change)), "torch")
    assert words in why


@pytest.mark.parametrize(
    "case", [Case(mask="causal"), Case(mask="bool:b11k"), Case(window=(2, 2)), Case(kv_lengths=(1, 2))], ids=str
)
def test_no_mask_beyond_its_limit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sdpa, "MAX_MASK_ELEMENTS", case.batch * case.q_len * case.kv_len - 1)
    (why,) = refusals(make(case), "torch")
    assert "dense mask of 2 x 9 x 13" in why
    # No mask is made where torch's own arguments say it all: the limit does not count.
    assert not refusals(make(Case(q_len=13, mask="causal")), "torch")
    assert not refusals(make(Case(q_len=1, mask="causal")), "torch")
    assert not refusals(make(Case()), "torch")


@pytest.mark.parametrize("case", [Case(), Case(q_len=13, mask="causal"), Case(q_len=1, mask="causal")], ids=str)
def test_makes_no_mask_where_torch_needs_none(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask costs torch its flash kernel."""
    masks = []
    real = torchs.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs["attn_mask"])
        return real(*args, **kwargs)

    monkeypatch.setattr(torchs, "scaled_dot_product_attention", spy)
    inputs = make(case)
    run(inputs, "torch")
    assert masks == [None]


@pytest.mark.parametrize("grads", ["q", "k", "v", "qk", "kv", "qv"])
def test_subsets_of_gradients(grads: str) -> None:
    check(FEATURES["lengths-causal"].but(grads=grads, dtype=FP32), "torch")


def test_a_float32_mask_is_not_rounded_to_bfloat16() -> None:
    """Steps finer than bfloat16 holds at this size decide the softmax."""
    case = Case(mask="additive:b1qk", mask_dtype=FP32, keep=1.0)
    inputs = make(case)
    inputs.options["mask"] = inputs.options["mask"] + 300.0
    assert_right(case, inputs, run(inputs, "torch"))


def test_upstream_garbage_in_blind_rows_reaches_nothing() -> None:
    case = FEATURES["lengths-causal"].but(dtype=FP32, grads="qkv")
    inputs = make(case)
    want = reference_results(inputs)
    inputs.grad_out.masked_fill_(~inputs.seen.any(-1)[..., None], torch.nan)
    assert_right(case, inputs, run(inputs, "torch"), want)


def test_serves_by_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTATTN_BACKENDS", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    q = torch.randn(1, 2, 5, 8)
    assert fastattn.explain(q, q, q, mask="causal").chosen == "torch"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("low", [torch.finfo(FP32).min, -1e30])
def test_gradients_of_rows_whose_scores_drown_in_their_bias(
    low: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a row sees all its keys alike. torch's backward would take each for the only one."""
    case = Case(mask="finfo:b1qk", mask_dtype=FP32, dtype=dtype, grads="qkv", batch=2, q_len=9, kv_len=11)
    inputs = make(case)
    mask = inputs.options["mask"]
    lowest = torch.finfo(FP32).min
    assert (mask == lowest).all(-1).any()
    inputs.grad_out = torch.randn_like(inputs.grad_out)
    want = reference_results(inputs)
    inputs.options["mask"] = mask.masked_fill(mask == lowest, low)
    assert_right(case, inputs, run(inputs, "torch"), want)
    # Where it is not so, torch's own backward runs.
    inputs.options["mask"] = mask.masked_fill(mask == lowest, -torch.inf)
    monkeypatch.setattr(torch_sdpa.reference, "backward", None)
    run(inputs, "torch")
