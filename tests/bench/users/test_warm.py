"""`fastattn sweep users --warm`: the kernels of all rows are known, and compiled, before the first one is measured."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from stand_in_backend import StandIn, stand_in_binaries
from stand_in_compiler import Flags, compiled, processes

from fastattn.backends.base import Compiled
from fastattn.backends.triton import limits
from fastattn.backends.triton.binaries import compilers
from fastattn.bench import results
from fastattn.bench.users import rows, run, warm
from fastattn.call import Call, Problem
from fastattn.cli.main import main
from fastattn.dispatch import registry, routes

CPU = torch.device("cpu")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are routed as on a GPU of compute capability 9.0, whose multiprocessors nobody asks for."""
    problem_of = Problem.of

    def on_gpu(call: Call, backward: bool = False) -> Problem:
        return dataclasses.replace(problem_of(call, backward), device="cuda", capability=(9, 0))

    monkeypatch.setattr(Problem, "of", staticmethod(on_gpu))
    monkeypatch.setattr(limits, "missing", lambda device_type: [])


@pytest.mark.usefixtures("fresh_caches", "on_hopper")
@pytest.mark.parametrize("row", [row.reduced() for row in rows.ROWS], ids=[row.name for row in rows.ROWS])
def test_the_kernels_of_every_row_are_known(row: rows.Row) -> None:
    x = row.tensors(CPU)[0].with_gradients(row)
    forward = Problem.of(warm.validated(warm.Arguments(x.q, x.k, x.v, **row.ours(x))))
    assert bool(forward.grads) == row.training
    problems = [forward, *([dataclasses.replace(forward, backward=True)] if row.training else [])]
    found = set(warm.flag_sets([row], CPU))
    for problem in problems:
        backend = routes.first_choice(problem, registry.allowed())
        if isinstance(backend, Compiled):
            assert set(backend.binaries(problem)) <= found, problem
            assert backend.binaries(problem)[0] in found
    assert found or row.dtype == torch.float32, "torch's kernels serve some rows in float32, ours all others"
    assert all(flags.capability == (9, 0) for flags in found)


@pytest.mark.usefixtures("fresh_caches", "on_hopper")
def test_each_kernel_is_asked_for_once() -> None:
    some = [row.reduced() for row in rows.chosen(["causal", "train B2"])]
    found = warm.flag_sets(some, CPU)
    assert len(found) == len(set(found)) < sum(len(warm.flag_sets([row], CPU)) for row in some)


@pytest.mark.usefixtures("fresh_caches", "fresh_warnings")
def test_they_are_compiled_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = stand_in_binaries(tmp_path, monkeypatch)

    class ByLength(StandIn):
        def flags_of(self, problem: Problem) -> Flags:
            return Flags("wrong" if problem.backward else "slow 0.2", problem.kv_len)

    ByLength(Flags()).installed(monkeypatch)
    monkeypatch.setattr(registry, "allowed", lambda: ("decode", "torch", "reference"))
    monkeypatch.setattr(compilers, "cores", lambda: 2)
    names = ["causal 64", "B16 512", "chunk 32/4096", "speculative 4/8192", "train B2 2048"]
    lengths = {rows.BY_NAME[name].reduced().sizes[4] for name in names}
    found = warm.main(["cpu", *names])
    assert found["kernels"] == len(lengths) + 1 and found["compiled"] == len(lengths)
    assert len(found["failed"]) == 1 and "the compiler does not like it" in found["failed"][0]
    assert len(compiled(tmp_path / "log")) == len(lengths) + 1 and len(processes(tmp_path / "log")) == 2
    assert found["seconds"] > 0
    binaries.compilers.stop()


def test_the_command_does_it_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; a CPU has nothing to compile."""
    file = tmp_path / "users.json"
    line = ["sweep", "users", "causal 64", "--device", "cpu", "--check", "--warm", "--json", str(file)]
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("0 kernels, 0 of them compiled now, in ")
    found = json.loads(file.read_text())
    assert found["warm"]["kernels"] == 0 and found["warm"]["failed"] == [] and found["complete"]


@pytest.mark.parametrize("error", [RuntimeError("no GPU left"), subprocess.TimeoutExpired("python", 3.0)])
def test_rows_are_measured_without_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = []

    def child(module: str, *arguments: str, **options: float) -> None:
        assert (module, arguments) == ("fastattn.bench.users.warm", ("cpu", "causal 64"))
        seconds.append(options["seconds"])
        raise error

    monkeypatch.setattr(results, "child", child)
    settings = run.Settings(CPU, quick=True, check=True, warm=True, seconds=500.0)
    found, failed = run.run(rows.chosen(["causal 64"]), settings, "x", None)
    assert not failed and found["complete"] and found["warm"] == {"failed": [str(error)]} and seconds == [500.0]
    assert f"not compiled: {error}" in capsys.readouterr().out
