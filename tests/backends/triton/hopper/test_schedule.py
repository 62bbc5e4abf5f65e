"""Why tiles are sorted: how long the slowest of 132 processors works for a batch of sequences, by a model of times.

The model's times are an H100's, roughly: a tile's own share, and that of each of its blocks of 128 keys.
"""

from __future__ import annotations

import random

import pytest

PROCESSORS, TILE, HEADS = 132, 128, 32
OF_A_TILE, OF_A_BLOCK = 0.55, 0.47  #: microseconds, at head dim 128


def blocks(lo: int, hi: int) -> int:
    return max(0, -(-(hi - lo) // TILE))


def left_padded(lengths: list[int], total: int = 2048) -> list[list[int]]:
    """Blocks of each tile that sees keys; rows of tiles from the last to the first."""
    levels = reversed(range(total // TILE))
    return [[n for length in lengths if (n := blocks(total - length, (m + 1) * TILE))] for m in levels]


def packed(cuts: list[int]) -> list[list[int]]:
    first = {m: max(c for c in cuts if c <= m * TILE) for m in range(cuts[-1] // TILE)}
    return [[blocks(first[m], (m + 1) * TILE)] for m in reversed(range(cuts[-1] // TILE))]


def slowest(tiles: list[int]) -> float:
    """The longest time of a program, in even shares. Programs take tiles forwards and backwards in turns."""
    times = [0.0] * PROCESSORS
    every = [OF_A_TILE + OF_A_BLOCK * n for n in tiles for _ in range(HEADS)]
    for i, time in enumerate(every):
        turn, pid = divmod(i, PROCESSORS)
        times[PROCESSORS - 1 - pid if turn % 2 else pid] += time
    return max(times) / (sum(every) / PROCESSORS)


_RANDOM = random.Random(0)
BATCHES = {
    "one long": (left_padded([2048] + [300] * 7), 2.0),
    "evenly": (left_padded([2048 - 256 * i for i in range(8)]), 1.2),
    "random": (left_padded([_RANDOM.randint(200, 2048) for _ in range(8)]), 1.2),
    "packed": (packed([0, *sorted(_RANDOM.sample(range(1, 8192), 49)), 8192]), 1.1),
    "packed, equal": (packed([*range(0, 8192, 164), 8192]), 1.05),
}


@pytest.mark.parametrize("name", BATCHES)
def test_longest_first_is_even(name: str) -> None:
    levels, unsorted = BATCHES[name]
    tiles = [n for level in levels for n in level]
    assert slowest(tiles) > unsorted
    assert slowest(sorted(tiles, reverse=True)) < 1.04


def test_tiles_see_what_they_are_said_to() -> None:
    assert packed([0, 130, 384]) == [[2], [2], [1]]
    assert left_padded([256], 512) == [[2], [1], [], []]
