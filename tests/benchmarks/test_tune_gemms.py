import pytest
import torch

from benchmarks import tune_gemms
from benchmarks.tune_gemms import SHAPES, Shape
from fastattn.lm.runners.fused.launch_config import Launch, choose_launch


def test_the_rules_are_among_what_is_tried():
    for shape in SHAPES:
        tried = set(tune_gemms.launches(shape))
        assert len(tried) > 10
        assert choose_launch(shape.size, shape.inner, shape.gated, torch.bfloat16) in tried


def test_table():
    launch = {"block_n": 8, "block_k": 512, "warps": 2, "us": 10.0}
    row = {"shape": {"name": "out"}, "bytes": 20_000_000, "cublas_us": None, "rule": launch, "best": [launch] * 2}
    launched = "10.0 us, 2.00 TB/s: 8 x 512, 2 warps"
    assert tune_gemms.cells(row) == ["out", "-", launched, launched, launched]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune_gemms.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tune_gemms, "launches", lambda shape: [Launch(2, 1024, 4)])
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        found = tune_gemms.tune(Shape("x", 512, 2048, norm=True, gated=True), torch.device("cuda", 0))
    assert 0 < found["cublas_us"] < 1000
    assert 0 < found["rule"]["us"] < 1000
    assert found["best"]
