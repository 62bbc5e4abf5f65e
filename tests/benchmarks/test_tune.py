"""What is tried, and what it is shown as; the measurements need a GPU."""

import json

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import SHAPES, Shape
from fastattn.backends.triton.decode import shapes
from fastattn.bench.case import Case
from fastattn.lm.runners.fused.launch_config import Launch, choose_launch


def test_the_rules_are_among_what_is_tried():
    for shape in SHAPES:
        tried = set(tune.gemm_launches(shape))
        assert len(tried) > 10
        assert choose_launch(shape.size, shape.inner, shape.gated, torch.bfloat16) in tried


def test_every_case_of_routing_fits_a_tile():
    cases = tune.routing_cases()
    assert len({case.label() for case in cases}) == len(cases) > 20
    rows = {case.q_len * case.q_heads // case.kv_heads for case in cases}
    assert max(rows) == shapes.MAX_ROWS


def test_every_anchor_is_a_case_of_its_tile():
    for tile in tune.tiles():
        assert tile.anchors and max(tile.anchors) < len(tile.cases)
        assert len({case.dim for case in tile.cases}) == 1


def test_the_fastest_come_first():
    times = {Launch(1, 512, 2): 3.0, Launch(2, 512, 2): None, Launch(4, 512, 2): 1.0, Launch(8, 512, 2): 2.0}
    assert [(one["block_n"], one["us"]) for one in tune.best_first(times, 2)] == [(4, 1.0), (8, 2.0)]


def test_tables():
    launch = {"block_n": 8, "block_k": 512, "warps": 2, "us": 10.0}
    row = {"shape": {"name": "out"}, "bytes": 20_000_000, "cublas_us": None, "rule": launch, "best": [launch] * 2}
    launched = "10.0 us, 2.00 TB/s: 8 x 512, 2 warps"
    assert tune.gemm_cells(row) == ["out", "-", launched, launched, launched]
    assert tune.routing_cells({"case": "x", "rows": 4, "decode": 3.0, "cudnn": 6.0}) == [
        "x",
        "4",
        "3.0",
        "6.0",
        "0.50x",
    ]
    assert tune.routing_cells({"case": "y", "rows": 8, "decode": 1.0, "cudnn": "no"}) == ["y", "8", "1.0", "no", "-"]
    launch = {"block_n": 16, "warps": 4, "stages": 2, "splits": 3, "us": None}
    cells = tune.decode_cells({"tile": "t", "case": "c", "rule": launch, "best": [launch | {"us": 2.0}]})
    assert cells == ["t: c", "- us: 3 x 16 keys, 4 warps, 2 stages", "2.0 us: 3 x 16 keys, 4 warps, 2 stages"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", tune.TUNINGS)
def test_without_a_gpu(name, capsys):
    assert tune.main([name]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_gemms_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "gemm_launches", lambda shape: [Launch(2, 1024, 4)])
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        [found] = tune.tune_gemms(Shape("x", 512, 2048, norm=True, gated=True), torch.device("cuda", 0))
    assert 0 < found["cublas_us"] < 1000
    assert 0 < found["rule"]["us"] < 1000
    assert found["best"]


@pytest.mark.gpu
def test_decode_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "BLOCKS", (16, 32))
    monkeypatch.setattr(tune, "WARPS", (4,))
    case = Case(1, 512, 1, head_major=True)
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        [found] = tune.tune_decode(tune.Tile("t", (case,), (0,)), torch.device("cuda", 0))
    assert (found["tile"], found["case"]) == ("t", case.label())
    assert 0 < found["best"][0]["us"] <= found["rule"]["us"] < 1000


@pytest.mark.gpu
def test_routing_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "routing_cases", lambda: [Case(4, 512, 1, head_major=True)])
    monkeypatch.setitem(tune.TUNINGS, "routing", tune.replace(tune.TUNINGS["routing"], cases=tune.routing_cases))
    assert tune.main(["routing", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["benchmark"] == "tune_routing" and found["command"].startswith("python -m benchmarks.tune routing ")
    [row] = found["rows"]
    assert row["rows"] == 16 and 0 < row["decode"] < 1000 and 0 < row["cudnn"] < 1000
