"""The order in which programs of the Hopper backward add: no wait is for a later program, and none is long.

The kernel's own functions say who visits what, and at which place; `test_model.py` runs them with all the rest.
"""

from __future__ import annotations

import heapq
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

from fastattn.backends.triton.hopper_backward.binary import BAND, CAUSAL, FULL, INTERVALS, ROWS, keys_of
from fastattn.backends.triton.hopper_backward.schedule import Choice, Sizes, candidates, choose, splits

pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")
OPEN = 1 << 29


class Step(NamedTuple):
    counter: tuple[int, ...]  #: of a tile: batch entry, head, tile; of a block that is shared: entry, head, block
    place: int  #: less than 0: zeros are added, in any order


def kernel() -> dict[str, Any]:
    from hopper_model import BACKWARD_FILES, Model

    return Model("hopper_backward", BACKWARD_FILES).names


def shape_of(s: Sizes, c: Choice, right: int = OPEN, left: int = OPEN) -> SimpleNamespace:
    return SimpleNamespace(
        batch=s.batch, heads=s.kv_heads * s.group, kv_heads=s.kv_heads, q_len=s.q_len, kv_len=s.kv_len, left=left,
        right=right, tiles=-(-s.q_len // ROWS), blocks=-(-s.kv_len // keys_of(s.dim)), share=s.group // c.split,
        split=c.split, section=c.section, sections=c.sections, keys=keys_of(s.dim),
    )  # fmt: skip


def programs(shape: Any, mask: int) -> Iterator[list[Step]]:
    """What each program adds to, step by step, in the order of tickets; as `order.give_turns` goes through it."""
    names, cfg = kernel(), SimpleNamespace(MASK=mask, KEYS=shape.keys)
    for ticket in range(shape.blocks * shape.batch * shape.kv_heads * shape.split):
        n, b, kv_head, head = (int(x) for x in names["block_of"](ticket, shape, cfg))
        first, end = (int(x) for x in names["visitors"](n, b, shape, cfg))
        steps = []
        for m in reversed(range(first, end)):
            place = int(names["place_in_order"](n, m, b, shape, cfg))
            steps += [Step((b, head + g, m), place) for g in range(shape.share)]
        if shape.split > 1 and first < end:
            steps.append(Step((b, kv_head, n, -1), int(names["part_of"](kv_head, head, shape))))
        yield steps


def check(shape: Any, mask: int) -> int:
    """Each counter is counted on by one program after the other, whose tickets rise. Returns how many wait."""
    counters: dict[tuple[int, ...], int] = defaultdict(int)
    waits = 0
    for steps in programs(shape, mask):
        assert len({step.counter for step in steps}) == len(steps)
        for counter, place in steps:
            if place >= 0:  # all that are before it have smaller tickets, and nobody was left out
                assert place == counters[counter], counter
                counters[counter] += 1
                waits += place > 0
    return waits


_SIZES = (1, 1, 1, 1, 1), (1, 2, 4, 500, 500), (2, 2, 2, 129, 900), (1, 3, 1, 65, 1300)
_WINDOWS = (0, 0), (63, 0), (64, 0), (200, 30), (1, 129), (500, 7)
CALLS = [
    *product((FULL, CAUSAL), _SIZES, [(-1, 0)]),
    *product((FULL,), ((2, 1, 4, 900, 129), (1, 1, 1, 64, 64)), [(-1, -1)]),
    *product((BAND,), ((1, 2, 2, 700, 700), (1, 1, 4, 1000, 1000)), _WINDOWS),
    (BAND, (1, 1, 2, 300, 900), (600, -1)),
    (BAND, (1, 1, 2, 300, 900), (700, 5)),
    (BAND, (2, 2, 1, 900, 300), (5, 600)),
]


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("mask, sizes, window", CALLS, ids=str)
def test_nobody_waits_for_a_later_program(
    mask: int, sizes: tuple[int, int, int, int, int], window: tuple[int, int], dim: int
) -> None:
    """In every split and every order of heads, those too that nobody chooses."""
    left, right = (OPEN if side < 0 else side for side in window)
    s = Sizes(*sizes, dim, True, processors=7)
    for choice in candidates(s, splits(s)):
        waits = check(shape_of(s, choice, right, left), mask)
        assert waits or min(sizes[3:]) <= keys_of(dim) or choice.split == 1
    heads = s.batch * s.kv_heads * 2
    if s.group % 2 == 0:
        for section in range(1, heads + 1):
            check(shape_of(s, Choice(2, section, heads // section), right, left), mask)


def test_nobody_waits_for_a_later_program_whatever_rows_see(seed: int) -> None:
    """Bounds of tiles as they are drawn: blocks whose tiles lie apart, tiles that see nothing."""
    from hopper_model import Pointer

    from fastattn.backends.triton.bounds_kernel import FIELDS, HEADER

    rng = random.Random(seed)
    for _ in range(40):
        dim = rng.choice((64, 256))
        keys = keys_of(dim)
        s = Sizes(rng.randint(1, 2), rng.randint(1, 2), 2, rng.randint(1, 900), rng.randint(1, 1500), dim, True)
        shape = shape_of(s, rng.choice(candidates(s, splits(s))))
        bounds = np.zeros(HEADER.value + s.batch * shape.tiles * FIELDS.value, np.int32)
        fields = bounds[HEADER.value :].reshape(s.batch, shape.tiles, FIELDS.value)
        extents = np.zeros((s.batch, shape.blocks, 4), np.int32)
        hits = 0
        for b in range(s.batch):
            for m in range(shape.tiles):
                lo, hi = sorted(rng.randint(0, s.kv_len) for _ in range(2))
                fields[b, m, :2] = (hi, lo) if rng.random() < 0.3 else (lo, hi)
            for n in range(shape.blocks):
                seen = [m for m in range(shape.tiles) if fields[b, m, 0] < fields[b, m, 1]]
                seen = [m for m in seen if fields[b, m, 1] > n * keys and fields[b, m, 0] < n * keys + keys]
                extents[b, n, :2] = (seen[0], seen[-1] + 1) if seen else (0, 0)
                hits += len(seen)
        shape.bounds, shape.extents = Pointer(bounds), Pointer(extents.reshape(-1))
        check(shape, INTERVALS)
        counted = [step for steps in programs(shape, INTERVALS) for step in steps if len(step.counter) == 3]
        assert sum(step.place >= 0 for step in counted) == hits * s.kv_heads * s.group


def duration(s: Sizes, choice: Choice, mask: int, behind: float) -> float:
    """Of a call in steps, with so many processors; a step's sum comes so long after that of the block before. Less than
    0: sums have no order."""
    free, done = [0.0] * s.processors, {}
    for steps in programs(shape_of(s, choice), mask):
        now = heapq.heappop(free) + 3.0
        for counter, place in steps:
            now += len(counter) == 3
            if place > 0 and behind >= 0:
                now = max(now, done[counter] + behind)
            done[counter] = now
        heapq.heappush(free, now)
    return max(free)


@pytest.mark.parametrize(
    "sizes, triangular, most",
    [
        ((1, 8, 4, 2048, 2048, 128), True, 1.15),
        ((2, 8, 4, 2048, 2048, 128), True, 1.1),
        ((2, 8, 4, 1000, 1000, 128), True, 1.15),
        ((1, 24, 1, 4608, 4608, 128), False, 1.1),
        ((2, 24, 1, 1000, 1000, 128), False, 1.1),
        ((1, 8, 2, 4096, 4096, 256), True, 1.1),
        ((1, 8, 2, 2048, 2048, 256), False, 1.1),
    ],
    ids=str,
)
def test_nobody_waits_long(sizes: tuple[int, ...], triangular: bool, most: float) -> None:
    """Where a sum comes a whole step after the one before it, a call takes little longer than without an order."""
    s = Sizes(*sizes, triangular, ordered=True)
    mask = CAUSAL if triangular else FULL
    choice = choose(s)
    free = duration(s, choice, mask, -1)
    assert free < duration(s, choice, mask, 1.0) < most * free
