"""The sweeps: what they measure, and end to end on the CPU."""

import argparse
import io
import json
from contextlib import redirect_stdout
from functools import cache, partial

import pytest
import torch
from measured_cases import CASES, CPU

from fastattn.bench import check, sweeps
from fastattn.bench.case import Case
from fastattn.bench.runner import Comparison, Figures, Runner
from fastattn.cli import main as cli
from fastattn.cli import sweep


def command(*argv):
    parser = argparse.ArgumentParser()
    sweep.add_command(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["sweep", *argv])
    arguments.argv = ["sweep", *argv]
    return arguments.run(arguments)


SECTIONS = {
    "decode": ["one query", "few queries", "head dims", "heads", "wide heads", "window and sinks", "ragged"],
    "backward": ["forward", "backward"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (what was written, where, what was printed), each sweep run once."""

    @cache
    def make(name):
        path, printed = tmp_path_factory.mktemp("sweep") / f"{name}.json", io.StringIO()
        with redirect_stdout(printed):
            assert command(name, "--quick", "--device", "cpu", "--seed", "3", "--json", str(path)) == 0
        return json.loads(path.read_text()), path, printed.getvalue()

    return make


@pytest.mark.parametrize("name", sweep.NAMES)
def test_a_sweep_writes_all_that_it_promises(name, made):
    found, path, out = made(name)
    keys = ("benchmark", "date", "command", "environment", "arguments", "method", "left_out", "seconds", "stats")
    assert set(found) == {*keys, "sections"}
    assert found["benchmark"] == f"sweep {name}"
    assert found["command"] == f"fastattn sweep {name} --quick --device cpu --seed 3 --json {path}"
    assert found["arguments"] == {"name": name, "quick": True, "device": "cpu", "seed": 3, "dtype": "bfloat16"}
    assert found["method"]
    assert {"torch-cudnn", "torch-flash"} <= set(found["left_out"])
    assert list(found["sections"]) == SECTIONS[name]
    for section, listed in found["sections"].items():
        assert listed
        for row in listed:
            assert "error" not in row
            assert f"{section}: {row['label']}: " in out  # progress, row by row
            assert "implementations" in row or row["figures"]
            for entry in row.get("implementations", {}).values():
                assert 0 < entry["min_us"] <= entry["us"] <= entry["max_us"]
                assert entry["method"] in ("wall", "host")
                assert 0 < entry["relative_error"] < check.GRADIENT_LIMIT
    assert f"Wrote {path}" in out


def test_decode_rows(made):
    sections = made("decode")[0]["sections"]
    for row in (row for section in sections.values() for row in section):
        us, read = row["implementations"]["fastattn"]["us"], row["read"]
        assert read["us"] == read["copy"]["us"] / 2
        assert row["ratios"]["/ read"] == us / read["us"]
        assert row["figures"]["TB/s"] == read["bytes"] / us / 1e6
        assert row["implementations"]["fastattn"]["gb_s"] == pytest.approx(1e3 * row["figures"]["TB/s"])
    (gpt_oss,) = sections["window and sinks"]
    assert gpt_oss["best_peer"] == "torch-math"
    math = gpt_oss["implementations"]["torch-math"]
    assert gpt_oss["ratios"]["/ best other"] == gpt_oss["implementations"]["fastattn"]["us"] / math["us"]
    ragged, equal = sections["ragged"]
    case = ragged["case"]
    assert ragged["read"]["bytes"] == sum(case["lengths"]) * 2 * case["kv_heads"] * case["dim"] * 2
    assert abs(ragged["read"]["bytes"] / equal["read"]["bytes"] - 1) < 0.05


def test_an_interrupted_sweep_writes_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "compare", interrupt)
    outputs = ["--json", f"{tmp_path}/x.json", "--plot", f"{tmp_path}/x.png"]
    assert cli.main(["sweep", "decode", "--device", "cpu", *outputs]) == 130
    assert capsys.readouterr().err == "fastattn: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="sweep: expected an NVIDIA GPU"):
        command("backward")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--device", "tpu"), "device: expected cpu, cuda"),
        (("--device", "cpu", "--seed", "-1"), "--seed: expected 0 or more"),
        (("--device", "cpu", "--json", "no/such/directory/x.json"), "there is no directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(argv, message, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        command("decode", *argv)


def test_ragged_and_equal_batches_hold_about_the_same():
    ragged, equal = sweeps.ragged(32, 8192, 0)
    assert len(ragged.lengths) == 32
    assert 128 <= min(ragged.lengths) < max(ragged.lengths) <= 8192
    assert abs(ragged.kv_bytes / equal.kv_bytes - 1) < 1e-3


def test_rows_of_every_phase(monkeypatch):
    """The full list, as on a GPU, without measuring it."""
    bench = Runner(CPU, quick=True, seed=0, say=lambda line: None)
    for which in range(3):
        monkeypatch.setattr(bench, "pick", lambda *given, which=which: given[which])
        found = sweeps.op_cases(bench)
        assert set(sweeps.FLEX) <= set(found)
        assert all(max(rows) < len(found[name]) for name, rows in sweeps.FLEX.items()) or which
        assert all(any(getattr(case, key) for case in found["masks"]) for key in ("padding", "packed", "lengths"))
        assert any(case.additive for case in found["masks"])
        assert any(case.sinks and case.left < 0 for case in found["windows, sinks, softcap"])
        assert {case.q_len == 1 for case in found["decode"]} == {True}


def test_the_roof_is_measured():
    row = sweeps.roof(CPU, torch.Generator().manual_seed(0))
    assert set(row["figures"]) == {"copy GB/s", "matmul TFLOP/s"}
    assert all(value > 0 for value in row["figures"].values())


@pytest.mark.gpu
@pytest.mark.slow
def test_the_op_sweep_on_a_gpu(tmp_path):
    """Everything but the full sizes: each implementation of torch that can do a call is right in it."""
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Runner(device, quick=True, seed=0, say=print)
    options = {"settle": True, "exact": True}
    with torch.cuda.stream(torch.cuda.Stream(device)):
        names = ("fastattn", "fastattn-dynamic", *sweeps.TORCH)
        bench.run(Comparison("inference", case, names, **options) for case in CASES)
        bench.run([Comparison("training", Case(300, 300, 2), ("fastattn", "flex"), "step", **options)])
        names = ("fastattn", "torch-cudnn")
        bench.run(Figures("fresh lengths", name, partial(sweeps.fresh_lengths, bench, name)) for name in names)
    assert not bench.failed
    for row in bench.sections["inference"]:
        assert row["implementations"]["fastattn"]["us"] > 0
