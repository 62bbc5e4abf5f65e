"""The command that times what a call costs the host."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import fastattn
from benchmarks import host
from benchmarks.null_backend import null_backend
from fastattn.dispatch import fast_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("host") / "host.json"
    assert host.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["benchmark"] == "host" and found["command"].startswith("python -m benchmarks.host --quick")
    return found


def test_rows(made: dict[str, Any]) -> None:
    """Each case with ours and over nothing, in all modes; torch's beside where it can do the same; the floors."""
    by_case: dict[str, set[tuple[str, str, str]]] = {}
    for row in made["rows"]:
        assert 0 < row["us"] <= row["median_us"], row
        by_case.setdefault(row["case"], set()).add((row["implementation"], row["what"], row["mode"]))
    assert set(by_case) == {"floor", *host.CASES}
    for name, case in host.CASES.items():
        implementations = {"fastattn", "fastattn, nothing computed"} | ({"torch"} if case.torchs else set())
        want = {(x, "forward", mode) for x in implementations for mode in host.MODES}
        if case.differentiated:
            want |= {(x, "forward and backward", "grad") for x in implementations}
        assert by_case[name] == want
    assert {x[0] for x in by_case["floor"]} == {
        "a Function of 3 arguments", "a Function of 18 arguments", "an output"
    }  # fmt: skip


def test_what_is_timed_is_the_same_call() -> None:
    """torch's function and ours agree on what a case computes."""
    for name, case in host.CASES.items():
        x = case.make(CPU)
        out = case.ours(*x.tensors, **x.options)
        assert out.shape == x.grad_out.shape, name
        if case.torchs is not None:
            torch.testing.assert_close(out, case.torchs(*x.tensors, **x.options), rtol=0.02, atol=0.02)


def test_nothing_is_computed() -> None:
    """The null backend serves everything and leaves nothing behind."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    sinks, mask = torch.randn(2, requires_grad=True), torch.randn(1, 1, 5, 5, requires_grad=True)
    with null_backend():
        assert fastattn.explain(q, q, q).chosen == "null"
        out = fastattn.scaled_dot_product_attention(q, q, q, sinks=sinks, mask=mask)
        found = torch.autograd.grad(out.sum(), (q, sinks, mask))
        assert [x.shape for x in found] == [q.shape, sinks.shape, mask.shape]
        assert fast_path._cached
    assert not fast_path._cached and fastattn.explain(q, q, q).chosen == "torch"


def test_an_error_is_a_row_and_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", broken)
    assert host.main(["--quick", "--device", "cpu", "--case", "lengths"]) == 1
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("lengths")]
    assert lines and all(line.endswith("RuntimeError: no such kernel") for line in lines)


def test_launches_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our kernels launch is launched again, and nothing else."""
    from fastattn.backends.triton.launcher import Launcher

    launched: list[Any] = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, tensors, floats=(): launched.append((self, tensors, floats)))
    launcher = Launcher.__new__(Launcher)

    def run() -> None:
        launcher((1, 2), (3.0,))
        launcher((4,))

    again = host._launches(run)
    assert again is not None
    launched.clear()
    again()
    assert launched == [(launcher, (1, 2), (3.0,)), (launcher, (4,), ())]
    assert host._launches(lambda: None) is None
