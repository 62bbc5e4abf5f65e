import pytest
import torch

from benchmarks import tune_routing
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.bench.case import Case


def test_every_case_fits_a_tile():
    cases = tune_routing.cases()
    assert len({case.label() for case in cases}) == len(cases) > 20
    rows = {case.q_len * case.q_heads // case.kv_heads for case in cases}
    assert max(rows) == launch.MAX_ROWS


def test_table():
    rows = [
        {"case": "x", "rows": 4, "decode": 3.0, "cudnn": 6.0},
        {"case": "y", "rows": 8, "decode": 1.0, "cudnn": "no"},
    ]
    assert tune_routing.cells(rows[0]) == ["x", "4", "3.0", "6.0", "0.50x"]
    assert tune_routing.cells(rows[1]) == ["y", "8", "1.0", "no", "-"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune_routing.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu():
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        found = tune_routing.measure(Case(4, 512, 1, head_major=True), torch.device("cuda", 0))
    assert found["rows"] == 16
    assert 0 < found["decode"] < 1000
    assert 0 < found["cudnn"] < 1000
