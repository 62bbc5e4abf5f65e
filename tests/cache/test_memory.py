"""`KVMemory`: rings and their windows, growth, rows that move."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastattn.cache.lengths import Lengths
from fastattn.cache.memory import KVMemory

HEADS, DIMS = 2, (4, 6)


def make(batch: int, size: int, ring: bool = False) -> KVMemory:
    return KVMemory.zeros(batch, HEADS, size, DIMS, torch.float32, torch.device("cpu"), ring)


def tokens(batch: int, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that hold the position of their token."""
    position = torch.arange(first, first + count, dtype=torch.float32)[None, None, :, None]
    keys, values = (position.expand(batch, HEADS, count, dim) for dim in DIMS)
    return keys, -values


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("size", [1, 3, 5, 50])
def test_the_window_before_a_step(size: int, known: bool) -> None:
    memory, lengths = make(2, size, ring=True), Lengths(2, None, "cpu")
    memory.keys.fill_(torch.nan)
    memory.values.fill_(torch.nan)
    steps = [4, 1, 1, 7, 2, 9, 1, 3]
    for start, new in zip(accumulate([0, *steps]), steps):
        lengths.begin(new)
        k, v = tokens(2, new, start)
        keys, values = memory.window_and(k, v, lengths.starts, start if known else None)
        before = min(start, size - 1)
        assert keys.shape == (2, HEADS, (before if known else size - 1) + new, DIMS[0])
        want = torch.arange(start - before, start + new, dtype=torch.float32)
        assert torch.equal(keys[..., -before - new :, 0], want.expand(2, HEADS, -1))
        assert torch.equal(values[..., -before - new :, 5], -want.expand(2, HEADS, -1))
        memory.append(k, v, lengths)


def test_windows_of_rows_of_different_lengths() -> None:
    memory, lengths = make(2, 4, ring=True), Lengths(2, None, "cpu")
    lengths.begin(6, torch.tensor([6, 2], dtype=torch.int32))
    memory.append(*tokens(2, 6), lengths)
    lengths.begin(2)
    keys, _ = memory.window_and(*tokens(2, 2, 90), lengths.starts)
    assert keys[0, 0, :, 0].tolist() == [3, 4, 5, 90, 91]
    assert keys[1, 1, 1:, 0].tolist() == [0, 1, 90, 91], "the first has no token"


def test_appending_converts_and_takes_any_strides() -> None:
    memory, lengths = make(2, 8), Lengths(2, 8, "cpu")
    lengths.begin(3)
    k, v = tokens(2, 3)
    memory.append(k.double().transpose(2, 3).contiguous().transpose(2, 3), v.half(), lengths)
    assert torch.equal(memory.keys[:, :, :3], k) and torch.equal(memory.values[:, :, :3], v)
    assert not bool(memory.keys[:, :, 3:].any())


def test_views_share_the_memory() -> None:
    memory, lengths = make(3, 8), Lengths(3, 8, "cpu")
    row = lengths.view(1, 1)
    row.begin(2)
    memory.rows(1, 1).append(*tokens(1, 2, 5), row)
    assert memory.keys[:, 0, :2, 0].tolist() == [[0, 0], [5, 6], [0, 0]]
    memory.copy_row(1, 2)
    assert torch.equal(memory.values[2], memory.values[1]) and bool(memory.values[2].any())


def test_grow_reorder_and_add_rows() -> None:
    memory, lengths = make(2, 4), Lengths(2, 9, "cpu")
    lengths.begin(4)
    k, v = tokens(2, 4)
    k, v = k + torch.tensor([10.0, 20.0])[:, None, None, None], v + 0
    memory.append(k, v, lengths)
    memory.grow(9)
    assert memory.size == 9 and torch.equal(memory.keys[:, :, :4], k) and torch.equal(memory.values[:, :, :4], v)
    assert not bool(memory.keys[:, :, 4:].any())
    address = memory.keys.data_ptr()
    memory.reorder(torch.tensor([1, 0]))
    assert memory.keys.data_ptr() == address and torch.equal(memory.keys[:, :, :4], k.flip(0))
    memory.reorder(torch.tensor([0]))
    memory.add_rows(2)
    assert memory.keys.shape == (3, HEADS, 9, DIMS[0]) and torch.equal(memory.keys[0, :, :4], k[1])
    assert not bool(memory.keys[1:].any())
    assert memory.nbytes == 3 * HEADS * 9 * sum(DIMS) * 4


def test_memory_made_in_inference_mode_can_be_written_outside() -> None:
    with torch.inference_mode():
        memory, lengths = make(1, 4), Lengths(1, 4, "cpu")
    lengths.begin(2)
    memory.append(*tokens(1, 2, 7), lengths)
    assert memory.keys[0, 0, :2, 0].tolist() == [7, 8]


@pytest.mark.parametrize("change", ["add", "swap", "keep one", "grow"])
def test_memory_changed_in_inference_mode_can_be_written_outside(change: str) -> None:
    memory, lengths = make(2, 4), Lengths(2, 9, "cpu")
    lengths.begin(1)
    memory.append(*tokens(2, 1, 3), lengths)
    with torch.inference_mode():
        rows = torch.tensor([1, 0] if change == "swap" else [1])
        for x in (memory, lengths):
            if change == "add":
                x.add_rows(1)
            elif change != "grow":
                x.reorder(rows)
        if change == "grow":
            memory.grow(9)
    batch = lengths.batch
    assert batch == {"add": 3, "keep one": 1}.get(change, 2)
    assert not (memory.keys.is_inference() or memory.values.is_inference() or lengths.tokens.is_inference())
    lengths.begin(2)
    memory.append(*tokens(batch, 2, 7), lengths)
    begin = [1] * min(batch, 2) + [0] * (batch - 2)
    assert [memory.keys[b, 0, n : n + 2, 0].tolist() for b, n in enumerate(begin)] == [[7, 8]] * batch
    lengths.empty()
    assert lengths.tokens.tolist() == [0] * batch
