"""Warnings are given once, at the caller's line; small memories and switches."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from caches import own_caches

import fastattn
from fastattn.backends import torch as torch_sdpa
from fastattn.backends.base import Refusal
from fastattn.common import notice
from fastattn.config import is_on


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "_given", set())


def test_a_warning_is_given_once_per_kind() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text, kind in (("a", None), ("a", None), ("b", "k"), ("c", "k"), ("d", None)):
            notice.warn_once(text, kind)
    assert [str(w.message) for w in caught] == ["a", "b", "d"]
    assert all(w.category is fastattn.FastattnWarning for w in caught)


@pytest.mark.parametrize("grad", [False, True])
def test_a_warning_points_at_the_line_that_called(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own_caches(monkeypatch)

    def forward(*args: object) -> None:
        raise Refusal("not today")

    monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", lambda *args: SimpleNamespace(forward=forward))
    q = torch.randn(1, 2, 3, 8, requires_grad=grad)
    with pytest.warns(fastattn.FastattnWarning, match="not today") as caught:
        fastattn.scaled_dot_product_attention(q, q, q)
    if not grad:  # with a gradient torch's dispatcher stands between
        assert caught[0].filename == __file__
    assert not caught[0].filename.startswith(notice._HERE)


@pytest.mark.parametrize("value, expected", [("0", False), ("OFF", False), ("no", False), ("1", True), ("yes", True)])
def test_switches(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_SWITCH", value)
    assert is_on("FASTATTN_SWITCH", not expected) is expected
    monkeypatch.setenv("FASTATTN_SWITCH", "maybe")
    with pytest.raises(ValueError, match=r"FASTATTN_SWITCH: expected one of 1, on, true, yes, 0, .*, got 'maybe'"):
        is_on("FASTATTN_SWITCH", expected)
    for unset in ("", None):
        monkeypatch.setenv("FASTATTN_SWITCH", unset) if unset is not None else monkeypatch.delenv("FASTATTN_SWITCH")
        assert is_on("FASTATTN_SWITCH", expected) is expected


WRONG = {
    "FASTATTN_PLANS": ("exakt", "yes"),
    "FASTATTN_CUDNN": ("never", "2", "-1"),
    "FASTATTN_DEBUG": ("all", "10"),
    "FASTATTN_INTERPRET": ("triton",),
    "FASTATTN_BACKENDS": ("torch,cudn", ",", "torch;cudnn"),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_a_switch_that_says_nothing_stops_the_call_that_reads_it(name: str, value: str) -> None:
    """By its name, in a process of its own: one of them is read at import. The command says it in one line."""
    program = """if True:
        import torch, fastattn
        q = torch.zeros(1, 1, 2, 8)
        try:
            fastattn.scaled_dot_product_attention(q, q, q)
            from fastattn.backends.cudnn.plan_policy import policy
            policy()  # what a call on a GPU asks
        except ValueError as error:
            print(error)
    """
    environment = {**os.environ, name: value}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.startswith(f"{name}: expected one ") and repr(value.split(",")[-1])[1:-1] in done.stdout
    if name in ("FASTATTN_PLANS", "FASTATTN_INTERPRET"):
        return  # not read by what follows
    command = [sys.executable, "-m", "fastattn", "explain", "--q", "1,2,3,8", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and f"error: {name}: expected one " in done.stderr
