"""The switches in the environment: what they may say, and that a wrong value stops the call that reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastattn.config import is_on


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
def test_a_wrong_value_stops_the_call_that_reads_it(name: str, value: str) -> None:
    """With the switch's name, in a process of its own: one switch is read at import. The command prints one line."""
    program = """if True:
        import torch, fastattn
        q = torch.zeros(1, 1, 2, 8)
        try:
            fastattn.scaled_dot_product_attention(q, q, q)
            from fastattn.backends.cudnn import plan_policy
            plan_policy.policy()  # what a call on a GPU asks
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
