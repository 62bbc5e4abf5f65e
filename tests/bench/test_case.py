"""A measured call as numbers, and as inputs of every implementation."""

import json
from dataclasses import asdict

import pytest
import torch
from measured_cases import CASES, CPU, IDS, inputs_of, seen

from benchmarks.report.sweep import case_of
from fastattn.bench import check
from fastattn.bench.case import Case
from fastattn.bench.inputs import Part, torch_mask


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_pairs_are_counted_as_words_say(case):
    assert case.pairs == int(seen(case).sum())
    assert case.useful_flops("inference") == 4.0 * case.pairs * case.q_heads * case.dim
    assert case.useful_flops("step") == case.useful_flops("training") + case.useful_flops("backward")


def test_values_in_the_keys_are_counted_once():
    case = Case(1, 4096, 64, 128, 1, 576, values=512, head_major=True)
    assert case.label() == "B=64 Sq=1 Skv=4096 128/1 D=576/512"
    assert case.kv_bytes == 64 * 4096 * 576 * 2
    assert case.useful_flops("inference") == case.flops() == 2.0 * 64 * 128 * 4096 * (576 + 512)
    assert case.useful_flops("step") == case.useful_flops("training") + case.useful_flops("backward")
    with pytest.raises(ValueError, match="values: expected at most"):
        Case(1, 9, dim=64, values=65)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_torchs_mask_says_the_same(case):
    mask = torch_mask(case, CPU, torch.Generator().manual_seed(1))
    words = seen(case)
    if mask is None:
        plain = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
        assert bool((words == (plain.tril() if case.q_len > 1 else plain)).all())
        return
    mask = mask if mask.dtype == torch.bool else mask > -torch.inf
    real = words.any(-1)  # what a query of padding attends to does not matter
    assert torch.equal(mask.expand(case.batch, 1, -1, -1)[:, 0][real], words[real])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_part_is_attention_of_its_own(case):
    (x,) = inputs_of(case)
    whole = check.reference(case, x, True, torch.float64)
    for part in (Part(0, 0), Part(case.batch - 1, case.kv_heads - 1)):
        found = check.reference(*part.of(case, x), True, torch.float64)
        assert check.relative_error(found, part.cut(case, whole)) < 1e-12


@pytest.mark.parametrize(
    "more",
    [
        {"padding": (1,)},
        {"padding": (1, 2), "kv_len": 9},
        {"packed": (4, 4)},
        {"packed": (4, 3), "batch": 1},
        {"padding": (1, 2), "additive": True},
    ],
)
def test_cases_that_mean_nothing_are_refused(more):
    with pytest.raises(ValueError, match="expected one"):
        Case(**{"q_len": 8, "kv_len": 8, "batch": 2, **more})


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_case_comes_back_from_a_file(case):
    assert case_of({"case": json.loads(json.dumps(asdict(case) | {"kind": "inference"}))}) == case
