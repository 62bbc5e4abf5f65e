"""FASTATTN_DEBUG=1 finds what is otherwise clamped, and backends that break their promises."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Intervals, debug
from fastattn.backends.torch import TorchBackend
from fastattn.call import Call, Problem

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "ENABLED", True)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "name, options",
    [
        ("q_lengths", {"q_lengths": ints(5, 6)}),
        ("q_lengths", {"q_lengths": ints(-1, 5)}),
        ("kv_lengths", {"kv_lengths": ints(8, 1)}),
        ("mask", {"mask": Intervals(ints(-1, 0)[:, None], ints(3, 3)[:, None])}),
        ("mask", {"mask": Intervals(ints(0, 0)[:, None], ints(3, 8)[:, None])}),
    ],
)
def test_values_that_are_otherwise_clamped(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        fastattn.scaled_dot_product_attention(Q, K, K, **options)
    monkeypatch.setattr(debug, "ENABLED", False)
    assert torch.isfinite(fastattn.scaled_dot_product_attention(Q, K, K, **options)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_mask_hides_what_is_not_finite(name: str, value: float) -> None:
    """Where every query may see it, or lengths exclude it, it may be anything."""
    inputs = {"k": K.clone(), "v": K.clone()}
    inputs[name][1, 1, 6, 3] = value
    hiding = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    seeing = hiding.clone()
    hiding[1, 2, 4, 6] = False  # from one query of one head that shares the key
    seeing[1, 1, 4, 6] = False  # from a head that does not
    for mask in (hiding, torch.zeros(hiding.shape).masked_fill(~hiding, -torch.inf)):
        with pytest.raises(ValueError, match=f"^{name}: expected finite numbers in the keys that mask hides"):
            debug.check_call(Call(Q, inputs["k"], inputs["v"], mask))
        debug.check_call(Call(Q, inputs["k"], inputs["v"], mask, kv_lengths=ints(7, 6)))
        debug.check_call(Call(Q, inputs["k"], inputs["v"], mask, right=0)._replace(mask=seeing))


def test_good_calls_pass() -> None:
    options: dict[str, Any] = {
        "kv_lengths": ints(7, 0),
        "q_lengths": ints(5, 0),
        "mask": "causal",
        "sinks": torch.zeros(4),
    }
    out, lse = fastattn.scaled_dot_product_attention(Q, K, K, return_lse=True, **options)
    assert out.shape == (2, 4, 5, 8)
    assert lse.shape == (2, 4, 5)
    q = Q.clone().requires_grad_()
    fastattn.scaled_dot_product_attention(q, K, K).sum().backward()


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda out: out.contiguous(), "not token-major"),
        (lambda out: out[:, :, 1:], "expected shape"),
        (lambda out: out.double(), "expected torch.float32"),
        (lambda out: out.mul_(torch.nan), "not finite"),
    ],
)
def test_a_backend_that_breaks_its_promises(
    spoil: Any, text: str, monkeypatch: pytest.MonkeyPatch, fresh_caches: None
) -> None:
    bind = TorchBackend.bind

    def spoiled(self: TorchBackend, problem: Problem, call: Call) -> Any:
        kernel = bind(self, problem, call)
        return SimpleNamespace(forward=lambda call: (spoil(kernel.forward(call)[0]), None))

    monkeypatch.setattr(TorchBackend, "bind", spoiled)
    with pytest.raises(AssertionError, match=f"torch: .*{text}"):
        fastattn.scaled_dot_product_attention(Q, K, K)


def test_the_switch_is_read_from_the_environment() -> None:
    for value, expected in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            [sys.executable, "-c", "from fastattn import debug; print(debug.ENABLED)"],
            env={"FASTATTN_DEBUG": value, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
