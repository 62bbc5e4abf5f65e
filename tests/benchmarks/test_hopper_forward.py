"""The rows of the Hopper forward's benchmark, and the line that each gives; the measurement needs an H100."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import hopper_forward

KEPT = Path(hopper_forward.__file__).parent / "results" / "h100" / "hopper_forward.json"


def test_the_kept_figures_are_of_these_rows():
    rows = json.loads(KEPT.read_text())["rows"]
    assert set(rows) <= set(hopper_forward.ROWS)
    for name, row in rows.items():
        line = hopper_forward.line_of(name, row)
        assert line.startswith(name) and float(line.split()[-1]) == round(
            row["ours"]["cold"] / min(row[peer]["cold"] for peer in row if peer != "ours"), 2
        )


def test_a_row_in_a_line():
    row = {"ours": {"cold": 100.4, "hot": 9.94, "host": 5.0}, "~cudnn": {"cold": 200.8, "hot": 8.0, "host": 7.0}}
    line = hopper_forward.line_of("window", row)
    assert line.split() == ["window", "100/9.9/5.0", "~201/8.0/7.0", "-", "0.50"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert hopper_forward.main([]) == 2
    assert "needs a GPU of compute capability 9.0" in capsys.readouterr().err
