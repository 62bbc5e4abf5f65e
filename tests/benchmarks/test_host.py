"""The command that times what a call costs the host."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from benchmarks import host, host_wall
from benchmarks.host_ratios import line_of_ratio, ratios
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
    """Each case with ours and over nothing, in all modes; torch's, and the drop-in's, where it can do the same."""
    by_case: dict[str, set[tuple[str, str, str]]] = {}
    for row in made["rows"]:
        assert 0 < row["us"] <= row["median_us"], row
        by_case.setdefault(row["case"], set()).add((row["implementation"], row["what"], row["mode"]))
    assert set(by_case) == {"floor", *host.CASES}
    for name, case in host.CASES.items():
        implementations = {"fastattn", "fastattn, nothing computed"}
        implementations |= set() if name == "varlen" else {"torch", "drop-in"}
        want = {(x, "forward", mode) for x in implementations for mode in host.MODES}
        if case.differentiated:
            want |= {(x, "forward and backward", "grad") for x in implementations}
        assert by_case[name] == want
    both = {x[0] for x in by_case["floor"] if x[1] == "forward and backward"}
    assert both == {"a Function of 3 arguments", "a Function of 18 arguments", "one operator in C++"}
    assert {x[0] for x in by_case["floor"]} == both | {"an output"}


def test_wall_time(made: dict[str, Any]) -> None:
    """Of calls as models make them, against each of torch's kernels that a CPU has."""
    found = {(row["case"], row["implementation"]): row["us"] for row in made["wall"]}
    assert set(found) == {(x, y) for x in host_wall.SHAPES for y in ("fastattn", "drop-in", "torch", "torch-math")}
    for shape in host_wall.SHAPES.values():
        runs = host_wall.contenders(shape, CPU)
        grads = {name: run() for name, (run, _) in runs.items()}
        for name, found_by_it in grads.items():
            for got, want in zip(found_by_it, grads["torch-math"]):
                assert (got - want).norm() < 0.02 * want.norm(), (shape, name)


def test_ratios(made: dict[str, Any]) -> None:
    """Against what torch has for the same, with the targets."""
    keys = {(x["case"], x["what"], x["mode"], x["implementation"]) for x in made["ratios"]}
    assert len(keys) == len(made["ratios"])
    for implementation in ("fastattn", "drop-in"):
        for name, case in host.CASES.items():
            if name != "varlen":
                assert {(name, "forward", mode, implementation) for mode in host.MODES} <= keys
                assert ((name, "forward and backward", "grad", implementation) in keys) == case.differentiated
        assert {(name, "wall time", "grad", implementation) for name in host_wall.SHAPES} <= keys
    targets = {"forward": 1.0, "forward and backward": 1.15, "wall time": 1.05}
    for row in made["ratios"]:
        assert row["target"] == targets[row["what"]] and row["meets"] == (row["ratio"] <= row["target"])
        assert row["ratio"] == pytest.approx(row["us"] / row["torch_us"], abs=1e-3)
        assert f"= {row['ratio']:.3f} {'<=' if row['meets'] else '> '} {row['target']}" in line_of_ratio(row)


def test_whom_ours_is_compared_with() -> None:
    def row(implementation: str, us: float, what: str = "forward") -> dict[str, Any]:
        return {"case": "a", "implementation": implementation, "what": what, "mode": "grad", "us": us}

    slow = {"case": "a", "implementation": "torch-cudnn", "what": "forward and backward", "mode": "grad", "error": "no"}
    rows = [row("fastattn", 6.0), row("torch-cudnn", 5.0), row("torch-flash", 4.0), row("its launches", 1.0)]
    rows += [row("fastattn", 6.0, "forward and backward"), slow, row("torch-flash", 8.0, "forward and backward")]
    wall = [row("fastattn", 6.0), row("torch", 6.0), row("torch-cudnn", 5.0), row("torch-math", 9.0)]
    found = {x["what"]: (x["torch"], x["ratio"]) for x in ratios(rows, wall)}
    assert found == {
        "forward": ("torch-cudnn", 1.2), "forward and backward": ("torch-flash", 0.75),
        "wall time": ("torch-cudnn", 1.2),
    }  # fmt: skip


def test_what_is_timed_is_the_same_call() -> None:
    """torch's function, the drop-in and ours agree on what a case computes."""
    for name, case in host.CASES.items():
        x = case.make(CPU)
        out = case.ours(*x.tensors, **x.options)
        assert out.shape == x.grad_out.shape, name
        for function in (case.torchs, case.dropped_in):
            if function is not None and case.torchs_on_a_cpu:
                want = function(*x.tensors, **x.for_torch().options)
                torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


def test_compiled_calls(tmp_path: Path) -> None:
    """Within torch.compile, with their floor; and what would be compiled too late is left out by name."""
    path = tmp_path / "host.json"
    arguments = ["--quick", "--device", "cpu", "--case", "dense mask", "--compiler", "eager", "--json", str(path)]
    assert host.main(arguments) == 0
    rows = [row for row in json.loads(path.read_text())["rows"] if row["mode"] == "compiled"]
    assert {(row["case"], row["implementation"], row["what"]) for row in rows} == {
        (*x, what)
        for x in [("floor", "one operator in C++"), *(("dense mask", y) for y in ("fastattn", "drop-in", "torch"))]
        for what in ("forward", "forward and backward")
    }
    assert host.main([*arguments, "--budget", "0"]) == 0
    found = json.loads(path.read_text())
    assert found["left_out"] == ["dense mask, compiled"]


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
    ours = [line for line in lines if " fastattn" in line]
    assert ours and all(line.endswith("RuntimeError: no such kernel") for line in ours)


def test_launches_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our kernels launch is launched again, and nothing else."""
    from fastattn.backends.triton.cuda_driver import BoundLaunch
    from fastattn.backends.triton.launcher import Launcher

    launched: list[Any] = []

    def of_a_binary(self: BoundLaunch, stream: int) -> None:
        launched.append((self, list(self.places), stream))

    monkeypatch.setattr(BoundLaunch, "__call__", of_a_binary)
    binary = BoundLaunch.__new__(BoundLaunch)
    binary.places = (ctypes.c_void_p * 2)(5, 6)
    monkeypatch.setattr(Launcher, "__call__", lambda self, tensors, floats=(): launched.append((self, tensors, floats)))
    launcher = Launcher.__new__(Launcher)

    def run() -> None:
        launcher((1, 2), (3.0,))
        launcher((4,))
        binary.places[0] = 5
        binary(7)

    again = host._launches(run)
    assert again is not None
    launched.clear()
    binary.places[0] = 8  # by another call
    again()
    assert launched == [(launcher, (1, 2), (3.0,)), (launcher, (4,), ()), (binary, [5, 6], 7)]
    assert list(binary.places) == [8, 6]
    assert host._launches(lambda: None) is None
