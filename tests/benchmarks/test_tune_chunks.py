"""What is tried, and what it is shown as; the measurements need a GPU."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import a_problem

from benchmarks import tune_chunks
from benchmarks.tune_chunks import ROWS, Bench, Row
from fastattn.backends.triton.decode import launch_config as rules
from fastattn.backends.triton.decode import shapes
from fastattn.bench.users.rows import BY_NAME


class Pretended(Bench):
    """A row on an H200 that is not there. Its launches take as long as they have programs too many or too few."""

    def __init__(self, row: Row) -> None:
        c, self.row, self.sms = row.case, row, 132
        gaps = {"mask": "intervals", "mask_shape": (c.batch, c.q_len), "mask_dtype": torch.int32} if row.gaps else {}
        self.problem = a_problem(
            batch=c.batch, q_heads=c.q_heads, kv_heads=c.kv_heads, q_len=c.q_len, kv_len=c.kv_len, head_dim=c.dim,
            value_dim=c.dim, **gaps,
        )  # fmt: skip
        self.rule = rules.choose(self.problem, self.sms)
        self.asked: list[Any] = []

    def time(self, one: Any) -> float | None:
        self.asked.append(one)
        return None if one.stages > 3 else 10.0 + abs(one.splits - 3) + one.block_n / 100

    def elsewhere(self) -> tuple[str, float | None]:
        return "hopper", 50.0


def test_rows() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and len({(row.case, row.gaps) for row in ROWS}) == len(ROWS)
    for name in set(names) & set(BY_NAME):
        c = next(row.case for row in ROWS if row.name == name)
        sizes = c.batch, c.q_heads, c.kv_heads, c.q_len, c.kv_len, c.dim, c.dim
        assert BY_NAME[name].sizes == sizes, "the same call as in the sweep"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_tried(row: Row) -> None:
    bench = Pretended(row)
    found = tune_chunks.tried(bench, 60.0)
    assert bench.asked[0] == bench.rule and len(set(bench.asked)) == len(bench.asked)
    assert found["tried"] == len(bench.asked) >= found["launches"] > 5
    assert len({one.splits for one in bench.asked}) > 1
    for one in bench.asked:
        assert 1 <= one.splits <= rules.MAX_SPLITS and (one.block_m >= shapes.rows(bench.problem) or one.near)
    times = [one["us"] for one in found["best"]]
    assert times == sorted(times) and times[0] <= (found["rule"]["us"] or 1e9)
    assert (found["elsewhere"], found["elsewhere_us"]) == ("hopper", 50.0)
    assert ("model" in found) == row.name.startswith("chunk")
    assert len(tune_chunks.cells(found)) == len(tune_chunks.HEAD)


def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen now is timed whatever happens."""
    monkeypatch.setattr(time, "perf_counter", iter(range(1000)).__next__)
    bench = Pretended(ROWS[0])
    found = tune_chunks.tried(bench, 3.0)
    assert 1 <= found["tried"] <= 4 and found["launches"] > 8 and found["rule"]["us"]
    assert tune_chunks.cells(found)[-1] == f"{found['tried']}/{found['launches']}"


def test_cells() -> None:
    launch = dataclasses.asdict(rules.choose(a_problem(q_len=32, kv_len=4096), 132)) | {"us": 12.0}
    row = {
        "row": "x", "rule": launch, "best": [launch | {"us": 10.0, "splits": 8}], "elsewhere": "hopper",
        "elsewhere_us": 49.7, "chunk": False, "model": (16.9, 47.9), "tried": 3, "launches": 9,
    }  # fmt: skip
    shown = "us: {} splits, 128 x 64, 8 warps, 3 stages"
    assert tune_chunks.cells(row) == [
        "x", "12.0 " + shown.format(16), "10.0 " + shown.format(8), "-", "1.20", "hopper 49.7",
        "17 / 48 (not routed)", "3/9",
    ]  # fmt: skip


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_chunks.main(["nothing"]) == 2
    assert "ROW: expected a part of chunk 32/4096" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tune_chunks.main(["chunk"]) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    assert tune_chunks.main(["chunk 32", "--seconds", "40", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    [row] = found["rows"]
    assert found["benchmark"] == "tune_chunks" and row["row"] == "chunk 32/4096"
    assert 0 < row["best"][0]["us"] <= row["rule"]["us"] < 1000 and 0 < row["elsewhere_us"] < 1000
