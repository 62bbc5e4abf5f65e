"""`Lengths`: what the device holds after each step, and what the host may rely on."""

from __future__ import annotations

import random

import pytest
import torch

from fastattn.cache import lengths as module
from fastattn.cache.lengths import Lengths


def make(batch: int = 3, capacity: int | None = 20) -> Lengths:
    return Lengths(batch, capacity, "cpu")


def counts(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capturing", lambda x: True)


def test_steps_of_all_rows() -> None:
    lengths = make()
    for new, before in ((5, 0), (1, 5), (9, 6)):
        lengths.begin(new)
        assert lengths.start == before and lengths.new == new and not lengths.ragged
        assert lengths.starts.tolist() == [before] * 3 and lengths.counts.tolist() == [new] * 3
        assert lengths.tokens.tolist() == [before + new] * 3 and lengths.agreed == before + new
    lengths.begin(9)  # callers that must not drop anything check `agreed` first
    assert lengths.counts.tolist() == [5] * 3 and lengths.agreed == 20 == lengths.bound


def test_steps_of_different_counts() -> None:
    lengths = make()
    lengths.begin(4, counts(4, -2, 9))
    assert lengths.counts.tolist() == lengths.tokens.tolist() == [4, 0, 4]
    assert lengths.start == 0 and lengths.ragged and lengths.agreed is None and lengths.bound == 4
    lengths.begin(1)
    assert lengths.start is None and lengths.tokens.tolist() == [5, 1, 5]
    lengths.empty()
    assert lengths.agreed == lengths.bound == 0 and lengths.equal


def test_rows_without_a_capacity() -> None:
    lengths = make(capacity=None)
    lengths.begin(30)
    lengths.begin(30, counts(30, 0, 2))
    assert lengths.tokens.tolist() == [60, 30, 32] and lengths.bound == 60


def test_a_view_is_a_part() -> None:
    lengths = make()
    row = lengths.view(1, 1)
    row.begin(7)
    assert lengths.tokens.tolist() == [0, 7, 0] and row.agreed == 7 and row.equal
    assert lengths.agreed is None and not lengths.equal
    lengths.begin(2)
    assert row.tokens.tolist() == [9] and row.agreed == 9
    lengths.view(0, 1).copy_from(row)
    assert lengths.view(0, 2).agreed == 9 and lengths.tokens.tolist() == [9, 9, 2]
    row.empty()
    assert lengths.tokens.tolist() == [9, 0, 2] and row.agreed == 0


def test_captured_rows_stay_unknown(capture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = make()
    lengths.view(0, 2).begin(1)
    monkeypatch.undo()
    assert lengths.view(0, 1).agreed is None and lengths.view(2, 1).agreed == 0
    lengths.empty()
    assert lengths.agreed is None and lengths.view(2, 1).known == 0
    lengths.begin(3)
    assert lengths.start is None and lengths.view(2, 1).agreed == 3 and lengths.bound == 20


def test_during_a_capture_nothing_is_known(capture: None) -> None:
    lengths = make()
    assert lengths.known is None and lengths.agreed == 0
    lengths.forget()
    assert lengths.agreed is None


def test_reorder_and_add_rows() -> None:
    lengths = make()
    lengths.begin(4)
    address = lengths.tokens.data_ptr()
    lengths.reorder(torch.tensor([2, 0, 1]))
    assert lengths.agreed == 4 and lengths.tokens.data_ptr() == address
    lengths.begin(4, counts(1, 2, 3))
    lengths.reorder(torch.tensor([2, 2, 0]))
    assert lengths.tokens.tolist() == [7, 7, 5] and lengths.counts.tolist() == [3, 3, 1] and lengths.agreed is None
    lengths.reorder(torch.tensor([1]))
    lengths.add_rows(2)
    assert lengths.batch == 3 and lengths.tokens.tolist() == [7, 0, 0] and lengths.starts.tolist() == [4, 0, 0]
    assert lengths.agreed is None and lengths.all_rows
    lengths.empty(torch.tensor([True, False, False]))
    assert lengths.tokens.tolist() == [0, 0, 0] and lengths.agreed is None


def test_crop() -> None:
    lengths = make()
    lengths.begin(9)
    lengths.crop(-2)
    assert lengths.tokens.tolist() == [7] * 3 and lengths.agreed == 7
    lengths.crop(5)
    assert lengths.tokens.tolist() == [5] * 3 and lengths.agreed == 5
    lengths.crop(-9)
    assert lengths.tokens.tolist() == [0] * 3 and lengths.agreed == 0


def test_what_the_host_knows_is_never_wrong(seed: int) -> None:
    """Random operations: wherever `agreed` is a number, it is every row's, and no row is longer than `bound`."""
    rng, lengths = random.Random(seed), make(4)
    for _ in range(200):
        part = lengths.view(*rng.choice([(0, 4), (0, 4), (1, 2), (3, 1)]))
        match rng.randrange(7):
            case 0:
                part.begin(3, torch.tensor([rng.randint(0, 3) for _ in range(part.batch)], dtype=torch.int32))
            case 1:
                part.empty()
            case 2:
                lengths.reorder(torch.tensor([rng.randrange(4) for _ in range(4)]))
            case 3:
                part.crop(rng.choice([-1, -3, 4]))
            case _:
                part.begin(rng.randint(1, 3))
        for view in (lengths, *(lengths.view(row, 1) for row in range(4))):
            assert view.agreed is None or view.tokens.tolist() == [view.agreed] * view.batch
        assert int(lengths.tokens.max()) <= lengths.bound
