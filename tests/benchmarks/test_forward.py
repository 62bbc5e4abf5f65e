"""The forward calls on each backend: which rows, what is called, and the quartiles beside the medians."""

import pytest
import torch

from benchmarks import forward, turns
from fastattn.bench.users.rows import BY_NAME

CPU = torch.device("cpu")


def test_the_rows_are_the_forward_calls_of_the_users():
    assert [row.name for row in forward.ROWS] == [name for name, row in BY_NAME.items() if not row.training]
    assert len(forward.ROWS) >= 40


@pytest.mark.parametrize("name", ["causal 2048", "T5 bias B8 512", "BERT padding B32 384", "causal as bf16 2048"])
def test_each_row_is_called_on_torchs_kernels(name, monkeypatch):
    """Under torch's plain kernel, in place of those that a CPU does not have: they compute what fastattn does."""
    row = BY_NAME[name].reduced()
    monkeypatch.setattr(forward, "TORCHS", dict.fromkeys(forward.TORCHS, forward.SDPBackend.MATH))
    found = forward.contenders(row, CPU)
    assert set(forward.TORCHS) <= set(found)
    (x,) = row.tensors(CPU)
    wide = [t.double() for t in (x.q, x.k, x.v)]
    want = forward.fastattn.scaled_dot_product_attention(*wide, **row.ours(x), backend="reference")
    for who in forward.TORCHS:
        assert ((found[who]().double() - want).norm() / want.norm()).item() < 8e-3, who


def test_what_torch_has_no_call_for_is_not_called():
    assert not set(forward.contenders(BY_NAME["sinks 2048"].reduced(), CPU)) & set(forward.TORCHS)


def test_medians_and_quartiles():
    samples = {"a": {"hot": [1.0, 2.0, 3.0, 4.0, 50.0], "host": [7.0]}}
    assert turns.medians(samples) == {"a": {"hot": 3.0, "host": 7.0}}
    assert turns.quarters(samples) == {"a": {"hot": [2.0, 4.0], "host": [7.0, 7.0]}}
