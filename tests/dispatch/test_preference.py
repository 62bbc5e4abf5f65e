"""Which backend is asked first, and what `explain` says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import a_problem

import fastattn
from fastattn import api
from fastattn.dispatch import preference, registry
from fastattn.dispatch.registry import NAMES

PROBLEM = dataclasses.replace(a_problem(), q_len=300)


def but(**changes: Any) -> Any:
    return dataclasses.replace(PROBLEM, **changes)


def before(order: tuple[str, ...], one: str, other: str) -> bool:
    return order.index(one) < order.index(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 512, "value_dim": 512},
        {"head_dim": 576, "value_dim": 512},
        {"dtype": torch.float32},
        {"kv_lengths": True},
        {"left": 100, "right": 0},
        {"mask": "segments", "mask_shape": (3, 7), "mask_dtype": torch.int32},
    ],
    ids=str,
)
def test_where_torch_has_no_kernel_of_its_own(changes: dict[str, Any]) -> None:
    """Its way is a matrix of all scores, or a mask of all queries and keys."""
    order = preference.ordered(but(**changes), NAMES)
    assert sorted(order) == sorted(NAMES)
    assert before(order, "prefill", "torch")
    assert before(order, "decode", "prefill")
    assert order[-1] == "reference"


def test_a_softcap_over_many_queries_is_not_for_decode() -> None:
    order = preference.ordered(but(softcap=30.0), NAMES)
    assert order[:3] == ("hopper", "prefill", "decode")
    assert preference.ordered(but(softcap=30.0, q_len=1), NAMES) == NAMES


@pytest.mark.parametrize(
    "changes, first",
    [
        (
            {"mask": "bool", "mask_shape": (1, 1, 1, 8192), "mask_dtype": torch.bool},
            ("decode", "hopper", "prefill", "torch", "cudnn"),
        ),
        (
            {"mask": "bool", "mask_shape": (1, 1, 1, 384), "mask_dtype": torch.bool, "kv_len": 384},
            ("decode", "prefill", "hopper", "torch", "cudnn"),
        ),
        (
            {"mask": "bool", "mask_shape": (1, 1, 300, 8192), "mask_dtype": torch.bool},
            ("hopper", "prefill", "decode", "torch", "cudnn"),
        ),
        ({"mask": "additive", "mask_shape": (1, 32, 300, 8192), "mask_dtype": torch.bfloat16}, ("hopper", "prefill")),
        ({"mask": "additive", "mask_shape": (1, 1, 3, 8192), "mask_dtype": torch.bfloat16}, ("decode", "hopper")),
        ({}, ("decode", "hopper", "cudnn")),
        ({"backward": True, "grads": "qkv"}, ("decode", "hopper", "cudnn", "torch", "prefill")),
        (
            {"backward": True, "grads": "qkvm", "mask": "additive", "mask_shape": (1, 32, 300, 8192)},
            ("hopper", "prefill", "torch"),
        ),
    ],
)
def test_masks_on_hopper(changes: dict[str, Any], first: tuple[str, ...]) -> None:
    assert preference.ordered(but(capability=(9, 0), **changes), NAMES)[: len(first)] == first
    if "backward" not in changes:
        assert preference.ordered(but(capability=(8, 0), **changes), NAMES)[1] == "hopper"  # which refuses there


@pytest.mark.parametrize("kind, dtype, by", [("bool", torch.bool, "hopper"), ("additive", torch.float32, "prefill")])
def test_gradients_under_a_mask_of_keys(kind: str, dtype: torch.dtype, by: str) -> None:
    """An additive one may be so low that scores drown in it, which the portable backward alone looks after."""
    pytest.importorskip("triton")
    p = but(capability=(9, 0), backward=True, grads="qkv", mask=kind, mask_shape=(1, 1, 1, 8192), mask_dtype=dtype)
    order = preference.ordered(p, NAMES)
    assert next(name for name in order if not registry.backend(name).reasons(p)) == by
    assert registry.backend("hopper").reasons(dataclasses.replace(p, mask_shape=(1, 1, 300, 8192)))


@pytest.mark.parametrize("head_dim, value_dim", [(256, 256), (192, 192), (256, 136)])
def test_gradients_of_wide_heads(head_dim: int, value_dim: int) -> None:
    """By the Hopper kernel, whatever masks."""
    pytest.importorskip("triton")
    keys = {"mask": "bool", "mask_shape": (1, 1, 1, 8192), "mask_dtype": torch.bool}
    dims = {"head_dim": head_dim, "value_dim": value_dim}
    for changes in (
        {},
        {"right": 0},
        {"left": 9},
        {"softcap": 50.0, "right": 0},
        {"softcap": 50.0, "right": 0, "left": 4095, "deterministic": True},
        {"softcap": 50.0, "kv_lengths": True},
        {"softcap": 50.0, "q_len": 1},
        keys,
    ):
        p = but(capability=(9, 0), backward=True, grads="qkv", **dims, **changes)
        order = preference.ordered(p, NAMES)
        padded = 3 * head_dim + 2 * value_dim < 0.88 * 5 * 256 and not p.softcap and not p.dense_mask
        assert before(order, "cudnn", "hopper") == padded  # which does not pad them
        assert padded or next(name for name in order if not registry.backend(name).reasons(p)) == "hopper"
        other = preference.ordered(dataclasses.replace(p, capability=(8, 0)), NAMES)
        assert before(other, "hopper", "cudnn")  # as ever: it refuses there


def test_gradients_of_heads_that_would_be_padded_much() -> None:
    """192 with 128: the backend that served them still does."""
    pytest.importorskip("triton")
    p = but(capability=(9, 0), backward=True, grads="qkv", head_dim=192, value_dim=128, softcap=50.0)
    order = preference.ordered(p, NAMES)
    assert next(name for name in order if not registry.backend(name).reasons(p)) == "prefill"


def test_gradients_whose_bits_repeat() -> None:
    """Under torch's deterministic algorithms the same backends serve: hopper's additions have an order then."""
    pytest.importorskip("triton")
    for changes in ({}, {"right": 0}, {"mask": "bool", "mask_shape": (1, 1, 1, 8192), "mask_dtype": torch.bool}):
        p = but(capability=(9, 0), backward=True, grads="qkv", deterministic=True, **changes)
        order = preference.ordered(p, NAMES)
        assert next(name for name in order if not registry.backend(name).reasons(p)) == "hopper"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_gradients_under_a_bias_are_right_first(capability: tuple[int, int]) -> None:
    changes = {"mask": "additive", "mask_shape": (1, 1, 300, 8192), "mask_dtype": torch.bfloat16, "grads": "qkv"}
    p = but(capability=capability, backward=True, **changes)
    order = preference.ordered(p, NAMES)
    assert order.index("prefill") < min(order.index("cudnn"), order.index("torch"))
    assert order.index("prefill") < order.index("hopper") or capability == (9, 0)  # which refuses it
    if capability != (9, 0):
        assert preference.ordered(but(capability=capability, **changes), NAMES) == NAMES  # the forward's stays


@pytest.mark.parametrize("changes", [{}, {"right": 0}, {"dtype": torch.float32, "q_heads": 8, "kv_heads": 8}], ids=str)
def test_plain_calls_keep_the_order(changes: dict[str, Any]) -> None:
    p = but(capability=(8, 0), **changes)
    assert preference.ordered(p, NAMES) == NAMES


def test_the_cpu_keeps_the_order() -> None:
    assert preference.ordered(but(device="cpu", index=-1, capability=(0, 0), head_dim=512), NAMES) == NAMES


def test_a_list_of_ones_own_stays() -> None:
    p = but(head_dim=512)
    assert preference.ordered(p, ("torch", "decode", "prefill")) == ("torch", "decode", "prefill")
    assert preference.ordered(p, ("torch",)) == ("torch",)
    assert preference.ordered(p, tuple(name for name in NAMES if name in ("torch", "prefill"))) == ("prefill", "torch")


def test_rules_name_backends_and_their_reason() -> None:
    for rules in preference.RULES.values():
        for rule in rules:
            assert set(rule.first) <= set(NAMES)
            assert rule.why
            assert isinstance(rule.holds(PROBLEM), bool)


def test_explain_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need no compiler: a call that they will serve is not said to wait for one."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    q = torch.randn(1, 2, 80, 16)
    for backend in ("decode", "prefill"):
        with fastattn.use_backend(backend, "reference"):
            found = fastattn.explain(q[:, :, :4], q, q)
            assert found.chosen == backend and found.reasons[backend] == []
            before = fastattn.stats()["calls"].get(backend, 0)
            fastattn.scaled_dot_product_attention(q[:, :, :4], q, q)
            assert fastattn.stats()["calls"][backend] == before + 1


def test_explain_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 3, 16)
    assert "in this order because" not in str(fastattn.explain(q, q, q))
    rule = preference.Rule(lambda p: True, ("reference",), "it was measured")
    monkeypatch.setattr(preference, "rule_for", lambda p: rule)
    found = api.explain(q, q, q)
    assert found.chosen == "reference"
    assert next(iter(found.reasons)) == "reference"
    assert str(found).splitlines()[-1].strip() == "in this order because it was measured"
