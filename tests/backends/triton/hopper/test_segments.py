"""Tiles of segments against `masks.bounds`: on the CPU through Triton's interpreter, on a GPU natively."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

pytest.importorskip("triton")

from hopper_masks import draw

from fastattn import Segments, masks
from fastattn.backends.triton.hopper.limits import sides
from fastattn.backends.triton.hopper.segments import HEADER_NUMBERS, TILE_NUMBERS, SegmentTiles
from fastattn.call import Call, Problem

TILE = 128
POISON = 0x7F7F7F7F


def call_of(table: Tensor, batch: int, q_len: int, kv_len: int, left: int = -1, right: int = -1) -> Call:
    q, k = (torch.empty(batch, 1, n, 8, device=table.device) for n in (q_len, kv_len))
    return Call(q, k, k, segments=table, left=left, right=right)


def found_by(call: Call) -> tuple[list[list[int]], list[list[int]]]:
    """Tiles and pieces. What the kernel does not write is as it was."""
    bound = SegmentTiles(Problem.of(call), call, TILE, sides(Problem.of(call)))
    memory = torch.full((bound.size + 4096,), 0x7F, dtype=torch.uint8, device=call.q.device)
    bound(call, memory)
    numbers = memory.view(torch.int32).cpu()
    tiles, pieces = numbers[:2].tolist()
    assert tiles <= bound.tiles
    records = numbers[HEADER_NUMBERS : bound.size // 4].view(-1, TILE_NUMBERS)
    assert pieces <= len(records) - bound.tiles
    if not tiles:
        assert records[0].tolist() == [0] * TILE_NUMBERS
    assert (numbers[2:HEADER_NUMBERS] == POISON).all() and (numbers[bound.size // 4 :] == POISON).all()
    assert (records[max(tiles, 1) : bound.tiles] == POISON).all() and (records[bound.tiles + pieces :] == POISON).all()
    return records[:tiles].tolist(), records[bound.tiles :][:pieces].tolist()


def units_of(tile: list[int], call: Call) -> int:
    """What tiles are sorted by: their keys, of the last of a segment as if all its rows were there, in units."""
    b, row, _, position, begin, *_ = tile
    table = call.segments
    assert table is not None
    has_rows = table.shape[0] % 2
    columns = [x for x in table.T.tolist() if not has_rows or x[0] == b]
    end = next(x for x in reversed(columns) if x[has_rows] <= row)[-1]
    keys = min(end, call.k.shape[2], position + TILE + sides(Problem.of(call))[1]) - begin
    return -(-keys // 64)


def check(call: Call) -> tuple[list[list[int]], list[list[int]]]:
    tiles, pieces = found_by(call)
    batch, q_len = call.q.shape[0], call.q.shape[2]
    left, right = sides(Problem.of(call))
    lo, hi = (x.expand(batch, -1).tolist() for x in masks.bounds(call))
    seen: list[list[object]] = [[None] * q_len for _ in range(batch)]
    for b, first, rows, position, begin, end, *_ in tiles:
        assert 1 <= rows <= TILE
        bounds = [(max(position + i - left, begin), min(position + i + right + 1, end)) for i in range(rows)]
        assert begin == min(x for x, _ in bounds) and end == max(x for _, x in bounds)
        for i, x in enumerate(bounds):
            assert x[0] < x[1] and seen[b][first + i] is None
            seen[b][first + i] = x
    for b, first, rows, *_ in pieces:
        assert 1 <= rows <= TILE
        for i in range(rows):
            assert seen[b][first + i] is None
            seen[b][first + i] = ()
    expected = [[(x, y) if x < y else () for x, y in zip(*both, strict=True)] for both in zip(lo, hi, strict=True)]
    assert seen == expected
    order = [units_of(x, call) for x in tiles]
    assert order == sorted(order, reverse=True)
    for one, other in pairwise(tiles):
        assert units_of(one, call) > units_of(other, call) or one[:2] < other[:2]
    return tiles, pieces


@pytest.mark.parametrize("kind", ["packed", "left", "chunks", "gaps", "wild"])
def test_equals_the_definition(kind: str, device: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        batch, q_len = rng.choice((1, 1, 2, 5)), rng.choice((1, 31, 127, 128, 129, 300, 520))
        kv_len = q_len if rng.random() < 0.5 else rng.choice((1, 90, 257, 700))
        table = draw(kind, rng, batch, 1, q_len, kv_len, device).fields["segments"]
        left, right = rng.choice((-1, -1, 0, 5, 70, 128, 400)), rng.choice((-1, 0, 0, 0, 3, 90))
        check(call_of(table, batch, q_len, kv_len, left, right))


def columns(*rows: list[int], device: str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, len(rows[0])).mT


def test_many_sequences(device: str, seed: int) -> None:
    """More than a program looks at together, tiny and empty ones, and tiles of several programs."""
    rng = random.Random(seed)
    for most in 3, 40, 300:
        lengths = [rng.choice((0, 1, 2, 3, rng.randint(0, most))) for _ in range(150)]
        lengths[70:75] = [127, 128, 129, 255, 257]
        cuts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        total = int(cuts[-1]) + 130
        tiles, pieces = check(call_of(Segments.packed(cuts).table, 1, total, total, right=rng.choice((-1, 0))))
        assert len(tiles) == sum(-(-n // TILE) for n in lengths) and 2 <= len(pieces) <= 3
        check(call_of(Segments.packed(cuts, cuts[-1] - cuts.flip(0)).table, 1, total, total, right=rng.choice((-1, 0))))


def test_left_padding(device: str) -> None:
    """Pieces of the padding are whole tiles of it; a row of nothing but padding, and one without."""
    padding = torch.tensor([130, 0, 512, 511], dtype=torch.int32, device=device)
    segments = Segments.left_padded(padding, 512, 512)
    tiles, pieces = check(call_of(segments.table, 4, 512, 512, right=0))
    assert [x[:3] for x in pieces] == [[0, 0, 128], [0, 128, 2], *[[2, i, 128] for i in (0, 128, 256, 384)],
                                       [3, 0, 128], [3, 128, 128], [3, 256, 128], [3, 384, 127]]  # fmt: skip
    assert tiles[0] == [1, 384, 128, 384, 0, 512, POISON, POISON]
    assert [3, 511, 1, 511, 511, 512] in [x[:6] for x in tiles]


def test_no_segments(device: str) -> None:
    for rows in 2, 3, 4, 5:
        table = torch.empty(rows, 0, dtype=torch.int32, device=device)
        tiles, pieces = check(call_of(table, 2, 200, 200))
        assert not tiles and [x[:3] for x in pieces] == [[0, 0, 128], [0, 128, 72], [1, 0, 128], [1, 128, 72]]


def test_rows_whose_positions_lie_before_their_keys(device: str) -> None:
    """More queries than keys in a segment: the first ones see nothing, but under a window to the right."""
    table = columns([0, 10, 200, 50, 60], [0, 200, 400, 60, 60], device=device)
    tiles, pieces = check(call_of(table, 1, 400, 70, right=0))
    assert [x[:6] for x in tiles] == [[0, 190, 10, 50, 50, 60]]
    tiles, _ = check(call_of(table, 1, 400, 70, left=3, right=2))
    assert [x[:6] for x in tiles] == [[0, 188, 12, 48, 50, 60]]


def test_segments_that_overlap(device: str) -> None:
    """The last that begins at a row has it, and no other, also where that one has ended."""
    table = columns([0, 0, 300, 0, 300], [0, 100, 150, 0, 40], [0, 100, 120, 7, 9], [1, 0, 5, 0, 5], device=device)
    tiles, _ = check(call_of(table, 2, 300, 300))
    assert sorted(x[:3] for x in tiles) == [[0, 0, 100], [0, 100, 20], [1, 0, 5]]


def test_a_table_that_is_not_sorted_is_not_trusted(device: str, seed: int) -> None:
    """Nothing is said of what rows see then. But each is written once, and nothing besides."""
    rng = random.Random(seed)
    special = -(1 << 31), (1 << 31) - 1, -1, 0, 1, 100, 300, 400
    for _ in range(12):
        table = [
            [rng.choice(special) if rng.random() < 0.3 else rng.randint(-5, 400) for _ in range(90)] for _ in "12345"
        ]
        table[0] = [rng.choice((0, 0, 1, 2, rng.choice(special))) for _ in range(90)]
        batch, q_len, kv_len = 3, rng.choice((130, 300)), 310
        call = call_of(
            torch.tensor(table, dtype=torch.int32, device=device), batch, q_len, kv_len, right=rng.choice((-1, 0))
        )
        tiles, pieces = found_by(call)
        rows = [(b, first + i) for b, first, n, *_ in (*tiles, *pieces) for i in range(n)]
        assert sorted(rows) == [(b, i) for b in range(batch) for i in range(q_len)]
        for _, _, n, position, begin, end, *_ in tiles:
            assert 1 <= n <= TILE and 0 <= begin < end <= kv_len and position < kv_len
