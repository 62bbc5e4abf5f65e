"""The runner of the sweeps: what a row says, also of what fails."""

import json
import os
from dataclasses import replace

import pytest
import torch

import fastattn
from benchmarks.plans import host_cost
from fastattn.bench import check, implementations, runner, sweeps, timing
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS
from fastattn.bench.runner import Comparison, Figures, Runner

CPU = torch.device("cpu")


def a_runner(device=CPU):
    return Runner(device, quick=True, seed=0, say=lambda line: None)


def test_a_failure_becomes_an_entry(monkeypatch):
    def refuse(case, x):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    def late(case, x):
        made = []

        def call():
            made.append(1)
            if len(made) > 1:
                raise RuntimeError("late")
            return implementations.bind_fastattn(case, x)()

        return call

    def wrong(case, x):
        return lambda: implementations.bind_fastattn(case, x)() * 1.02

    mine = IMPLEMENTATIONS["fastattn-dynamic"]
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-cudnn", replace(mine, name="torch-cudnn", binder=refuse))
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-math", replace(mine, name="torch-math", binder=late))
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-flash", replace(mine, name="torch-flash", binder=wrong))
    bench = a_runner()
    names = ("fastattn", "torch-cudnn", "torch-math", "torch-flash")
    bench.run([Comparison("s", Case(9, 9), names)])
    (row,) = bench.sections["s"]
    entries = row["implementations"]
    assert entries["torch-cudnn"]["error"] == "RuntimeError: No available kernel. Aborting execution."
    assert entries["torch-math"]["error"] == "RuntimeError: late"
    assert "wrong result: relative error 2.0" in entries["torch-flash"]["error"]
    assert entries["fastattn"]["us"] > 0
    assert runner.best_peer(row) is None
    assert not any("us" in entries[name] for name in names[1:])
    assert "torch-cudnn failed (RuntimeError: No available" in runner.summary(row)
    assert sweeps.section_table(bench.sections["s"]).splitlines()[-1].split()[-4:] == ["-", "-", "-", "-"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_a_wrong_result(value, monkeypatch):
    def nothing(case, x):
        return lambda: torch.full_like(x.q, value)

    monkeypatch.setitem(IMPLEMENTATIONS, "fastattn", replace(IMPLEMENTATIONS["fastattn"], binder=nothing))
    monkeypatch.setattr(runner, "stats", _counting(fastattn.stats))
    bench = a_runner()
    bench.run([Comparison("s", Case(9, 9), ("fastattn",))])
    entry = bench.sections["s"][0]["implementations"]["fastattn"]
    assert entry["relative_error"] is None
    assert f"relative error {value}" in entry["error"]
    assert bench.failed
    json.dumps(bench.sections, allow_nan=False)


def _counting(stats):
    """stats() as if each look at it had seen one more call served."""
    looks = []

    def look():
        looks.append(1)
        return {**stats(), "calls": {"torch": len(looks)}}

    return look


def test_a_row_that_raises_costs_that_row_only():
    bench = a_runner()
    bench.run([Figures("s", "bad", lambda: 1 // 0), Figures("s", "good", lambda: {"figures": {"x": 1.0}})])
    bad, good = bench.sections["s"]
    assert bad == {"label": "bad", "error": "ZeroDivisionError: integer division or modulo by zero"}
    assert good == {"label": "good", "figures": {"x": 1.0}}
    assert bench.failed
    assert sweeps.section_table([bad, good]).splitlines()[2:] == ["bad   -", "good  1"]


def test_calls_too_large_for_the_reference_are_not_checked(monkeypatch):
    monkeypatch.setattr(check, "MOST_FLOPS", Case(9, 9).flops())
    assert a_runner().compare(Comparison("s", Case(9, 9), ("fastattn",)))["check"] == "reference"
    row = a_runner().compare(Comparison("s", Case(9, 9), ("fastattn",), "backward"))
    assert row["check"] == "skipped: the reference would take 4.6e+06 operations"
    assert row["implementations"]["fastattn"]["us"] > 0
    assert "relative_error" not in row["implementations"]["fastattn"]


def test_ratios():
    row = {"implementations": {"fastattn": {"us": 3.0}, "torch-a": {"us": 2.0}, "torch-b": {"error": "x"}}}
    assert runner.best_peer(row) == ("torch-a", 2.0)
    assert runner.quotient(runner.time_of(row, "fastattn"), runner.time_of(row, "torch-a")) == 1.5
    assert runner.time_of(row, "torch-b") is runner.time_of(row, "torch-c") is None
    assert runner.quotient(None, 2.0) is runner.quotient(2.0, None) is runner.quotient(2.0, 0.0) is None
    assert timing.spread([1.0, 9.0, 2.0]) == {"median_ms": 2.0, "worst_ms": 9.0}


def test_settling_builds_the_static_plan(monkeypatch):
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    seen = []
    runner.build_static_plan(lambda: seen.append(os.environ["FASTATTN_PLANS"]))
    assert seen == ["static"]
    assert "FASTATTN_PLANS" not in os.environ


def test_a_wrong_part_is_found(monkeypatch):
    """One K/V head of one batch entry is looked at: an error in it is seen, whichever it is."""
    bench = Runner(CPU, quick=True, seed=0, say=lambda line: None)
    case = Case(9, 9, 2, 4, 2, 16)
    part = check.drawn_part(case, 0)

    def wrong(case, x):
        def call():
            out = implementations.bind_fastattn(case, x)().clone()
            part.cut(case, (out,))[0].mul_(1.05)
            return out

        return call

    mine = IMPLEMENTATIONS["fastattn-dynamic"]
    monkeypatch.setitem(IMPLEMENTATIONS, "torch-math", replace(mine, name="torch-math", binder=wrong))
    row = bench.compare(Comparison("s", case, ("fastattn", "torch-math"), exact=True))
    assert row["check"] == f"reference in float64, batch entry {part.entry}, K/V head {part.head}"
    assert "wrong result" in row["implementations"]["torch-math"]["error"]
    assert row["implementations"]["fastattn"]["relative_error"] < check.OUTPUT_LIMIT


def test_a_step_is_forward_and_backward():
    bench = Runner(CPU, quick=True, seed=0, say=lambda line: None)
    row = bench.compare(Comparison("s", Case(9, 9, 2, 4, 2, 16), ("fastattn", "torch-math"), "step", exact=True))
    for entry in row["implementations"].values():
        assert 0 < entry["relative_error"] < check.GRADIENT_LIMIT
        assert entry["first_ms"] > 0
    assert row["implementations"]["fastattn"]["served_by"] == "torch"
    assert row["case"]["kind"] == "step"


def test_a_refusal_is_no_failure(monkeypatch):
    bench = Runner(CPU, quick=True, seed=0, say=lambda line: None)
    bench.run([Comparison("s", Case(9, 9, sinks=True), ("fastattn", "torch-math"))])
    (row,) = bench.sections["s"]
    assert "expected one query" in row["implementations"]["torch-math"]["refused"]
    assert "torch-math refuses" in runner.summary(row)
    assert not bench.failed


@pytest.mark.gpu
def test_every_implementation_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    bench = a_runner(device)
    everyone = ("fastattn", "fastattn-dynamic", "fastattn-static", "torch-cudnn", "torch-flash")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for kind in ("inference", "training", "backward"):
            row = bench.compare(Comparison("s", Case(300, 300, batch=2), everyone, kind, eager=True))
            for entry in row["implementations"].values():
                assert (entry["method"], entry["eager"]["method"]) == ("graph", "queue"), entry
        bench.run([Comparison("host", Case(128, 128), everyone, timer=host_cost, derive=False)])
        ragged = Case(1, 512, 3, head_major=True, lengths=(512, 1, 100))
        window = Case(1, 512, 2, 64, 8, 64, head_major=True, left=127, sinks=True)
        for case in (Case(1, 512, head_major=True), Case(4, 512, head_major=True), ragged, window):
            peers = ("torch-flash", "torch-math") if case.sinks else ("torch-cudnn", "torch-flash", "torch-efficient")
            bench.run([Comparison("decode", case, ("fastattn", *peers), settle=True, read=True)])
    assert not bench.failed
    for row in bench.sections["decode"]:
        assert row["implementations"]["fastattn"]["method"] == "graph"
        assert row["best_peer"], row
        assert row["read"]["us"] > 0
