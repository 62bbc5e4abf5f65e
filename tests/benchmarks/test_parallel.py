"""The benchmark command, tried out on gloo; its tables from its file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import parallel, parallel_model

REPO = Path(__file__).parents[2]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
COMMAND = [*TORCHRUN, "benchmarks.parallel"]
ON_CPU = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def test_it_runs_under_torchrun_and_writes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "parallel.json"
    options = ["--device", "cpu", "--tokens", "48", "--training-tokens", "40", "--repeats", "1", "--warmup", "1"]
    environment = os.environ | ON_CPU
    done = subprocess.run(
        [sys.executable, *COMMAND, *options, "--calls", "2", "--json", str(file)],
        capture_output=True, text=True, timeout=300, check=False, cwd=REPO, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert report["ranks"] == 2 and report["environment"]["torch"]
    assert [(s["length"], s["backward"]) for s in report["sections"]] == [(48, False), (40, True)]
    for section in report["sections"]:
        assert [row["strategy"] for row in section["rows"]] == ["ulysses", "ring", "allgather", "auto"]
        for row in section["rows"]:
            assert row["ms"] > 0 and row["predicted_ms"] > 0
            assert set(row["errors"]) == ({"out", "dq", "dk", "dv"} if section["backward"] else {"out"})
            assert all(error < 1e-5 for error in row["errors"].values())
    assert all(row["error"] < 1e-5 and row["us"] > 0 for row in report["decode"])
    assert re.search(r"^40 +forward \+ backward +one GPU ", done.stdout, re.MULTILINE)

    assert parallel.main(["--markdown", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 5  # a head, and per section one GPU and four strategies
    assert len({line.count("|") for line in lines}) == 1
    assert f"{report['sections'][0]['rows'][1]['ms']:.2f}" in lines[4]


def test_a_prompt_through_a_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    options = [
        "--device",
        "cpu",
        "--model",
        "tiny",
        "-p",
        "71",
        "-g",
        "3",
        "--check-tokens",
        "33",
        "--strategy",
        "ring",
    ]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "benchmarks.parallel_model", *options, "--json", str(file)],
        capture_output=True, text=True, timeout=300, check=False, cwd=REPO, env=os.environ | ON_CPU,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert report["ranks"] == len(report["peak_memory"]) == 2
    assert report["prompt_s"] > 0 and report["generation_tps"] > 0
    assert 0 < report["error"] < 1e-5  # in another order, so not the very same
    assert f"{report['prompt_tps']:.0f}" in done.stdout


@pytest.mark.parametrize("command", [parallel, parallel_model])
def test_without_torchrun_it_says_what_to_do(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert command.main([]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((REPO / "benchmarks" / "results").glob("*/parallel-[0-9].json")), ids=str)
def test_the_document_holds_what_was_measured(file: Path) -> None:
    document = (REPO / "docs" / "parallel.md").read_text(encoding="utf-8")
    assert parallel.markdown(json.loads(file.read_text())) in document


def test_the_document_holds_what_the_model_predicts() -> None:
    assert parallel.paper() in (REPO / "docs" / "parallel.md").read_text(encoding="utf-8")


def test_the_table_of_a_file_that_a_stranger_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    for more in ({}, {"ranks": 1}, {"ranks": 1, "sections": 1}):
        path.write_text(json.dumps({"benchmark": "parallel", "environment": {}} | more))
        with pytest.raises(ValueError, match="expected a result file as fastattn writes it"):
            parallel.main(["--markdown", str(path)])
    name = "\x1b[31m"
    rows = [{"strategy": name, "chosen": name, "ms": 1, "predicted_ms": 1, "speedup": 1, "errors": {"a": 1}}]
    section = {"backward": False, "length": name, "one_ms": 1, "rows": rows}
    path.write_text(json.dumps({"benchmark": "parallel", "environment": {}, "ranks": 2, "sections": [section]}))
    assert parallel.main(["--markdown", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"\x1b[31m" in printed


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_strategies_over_nccl(tmp_path: Path) -> None:
    """Two GPUs or more against one, bfloat16, and a length that nothing divides."""
    file, ranks = tmp_path / "parallel.json", 4 if torch.cuda.device_count() >= 4 else 2
    command = [argument if argument != "2" else str(ranks) for argument in COMMAND]
    options = ["--tokens", "8191", "--training-tokens", "4099", "--repeats", "2", "--graphs", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, timeout=540, check=False, cwd=REPO
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    for section in report["sections"]:
        for row in section["rows"]:
            assert row["errors"]["out"] < 6e-3, row  # both are rounded
            assert all(error < 1.2e-2 for error in row["errors"].values()), row
    assert all(row["error"] < 6e-3 for row in report["decode"])
