"""The kernels of a call one by one: which rows, and what is said of them."""

import pytest
import torch

from benchmarks import kernels
from fastattn.bench.users.rows import chosen


def test_the_rows_are_those_under_masks_with_a_row_for_each_query():
    names = [row.name for row in chosen(kernels.MASKED, kernels.ROWS)]
    assert names == [row.name for row in kernels.ROWS if row.mask is not None]


def test_medians_of_kernels_and_the_call(monkeypatch):
    calls = []

    def times(work):
        work()
        return {"classify_kernel": [3.0, 1.0, 2.0], "forward_kernel": [9.0] * 3}

    monkeypatch.setattr(kernels, "kernel_times", times)
    monkeypatch.setattr(kernels, "captured", lambda call: call)
    monkeypatch.setattr(kernels, "best", lambda replay: 12.5)
    found = kernels.kernels_of(lambda: calls.append(None))
    assert found == {"classify_kernel": 2.0, "forward_kernel": 9.0, "call": 12.5}
    assert len(calls) == kernels.CALLS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert kernels.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
