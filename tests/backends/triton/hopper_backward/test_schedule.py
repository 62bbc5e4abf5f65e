"""The order of the Hopper backward's work: each block is reached once, no length is far worse than its neighbour."""

from __future__ import annotations

import heapq
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

from fastattn.backends.triton.hopper_backward import schedule
from fastattn.backends.triton.hopper_backward.schedule import Choice, Sizes, candidates, choose, estimate, splits

#: Times of every choice on a grid of sizes: what `python -m benchmarks.hopper_backward --tune` wrote.
MEASURED = Path(__file__).parents[4] / "benchmarks" / "results" / "h200" / "hopper_backward_tune.json"
SHAPES = [(1, 8, 4), (2, 8, 4), (4, 8, 4), (16, 8, 4), (2, 16, 1), (1, 24, 1), (64, 16, 1), (1, 1, 8)]


@pytest.mark.parametrize("batch, kv_heads, group", SHAPES)
@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize("dim", [128, 256])
def test_no_cliffs(batch: int, kv_heads: int, group: int, triangular: bool, dim: int) -> None:
    """From a length to the next the estimate grows as the work does, within 6%."""
    last = 0.0
    for n in range(512, 6000, 16):
        sizes = Sizes(batch, kv_heads, group, n, n, dim, triangular)
        by_work = estimate(sizes, choose(sizes)) / (n * (n + 128))
        assert last == 0 or 0.94 < by_work / last < 1.04, n
        last = by_work


def test_the_choice_is_the_best_candidate() -> None:
    for batch, kv_heads, group in SHAPES:
        for n in (40, 300, 1000, 3177, 9000):
            sizes = Sizes(batch, kv_heads, group, n, n, 128, True)
            best = min(estimate(sizes, c) for c in candidates(sizes, splits(sizes)))
            assert estimate(sizes, choose(sizes)) == best


def test_the_choice_is_near_the_best_that_was_measured() -> None:
    """On an H200, within 6% in every row of the grid and 2% in the mean."""
    ratios = {}
    for name, row in json.loads(MEASURED.read_text())["tune"].items():
        batch, heads, length = name.split()
        q_heads, kv_heads = (int(x) for x in heads.split("/"))
        sizes = Sizes(int(batch[1:]), kv_heads, q_heads // kv_heads, int(length), int(length), 128, True)
        times = {x: time for x, time in row["hot"].items() if x != "own"}  # "own" is one of the others, once more
        ratios[name] = times[" ".join(str(x) for x in choose(sizes))] / min(times.values())
    assert len(ratios) == 51
    assert max(ratios.values()) <= 1.06, ratios
    assert sum(ratios.values()) / len(ratios) <= 1.02


def test_few_programs_are_split() -> None:
    assert choose(Sizes(1, 8, 4, 1000, 1000, 128, True)).split > 1
    assert choose(Sizes(64, 16, 1, 257, 257, 64, False)).split == 1
    assert choose(Sizes(16, 8, 4, 1000, 1000, 128, True)).split == 1
    # Wide heads have twice the blocks, of half as many keys.
    assert choose(Sizes(1, 4, 2, 1000, 1000, 256, True)).split == 2
    assert choose(Sizes(1, 8, 2, 4096, 4096, 256, True)).split == 1


def _slowest(sizes: Sizes, choice: Choice, lengths: list[int]) -> float:
    """Steps of the processor that is done last, over an even share, in a left-padded batch of such lengths. A program
    begins as soon as a processor is free."""
    heads, tiles = sizes.kv_heads * choice.split, -(-sizes.q_len // 64)
    done = [0.0] * sizes.processors
    start, work = 0, 0.0
    while start < sizes.batch * heads:
        section = choice.section if start < choice.sections * choice.section else sizes.batch * heads - start
        for block in range(-(-sizes.kv_len // 128)):
            for at in range(start, start + section):
                first = max(block * 128, sizes.kv_len - lengths[at // heads])
                steps = 0.3  # to find that there is nothing to do
                if first < block * 128 + 128:
                    steps = (tiles - first // 64) * sizes.group / choice.split + 3.4
                work += steps
                heapq.heappush(done, heapq.heappop(done) + steps)
        start += section
    return max(done) / (work / sizes.processors)


def test_padded_batches_end_together() -> None:
    """Also where the longest entries come last: programs of the last section are not all that is left."""
    sizes = Sizes(8, 8, 4, 2048, 2048, 128, True, ragged=True)
    lengths = [512 + i * 1536 // 7 for i in range(8)]
    for given in (lengths, lengths[::-1], [2048] * 8):
        assert _slowest(sizes, choose(sizes), given) < 1.05
    even = replace(sizes, ragged=False)
    assert _slowest(even, choose(even), lengths) > 1.08  # what it is for


def test_a_choice_can_be_forced() -> None:
    sizes = Sizes(2, 8, 4, 1000, 1000, 128, True)
    with schedule.forced(2, 3, 1):
        assert choose(sizes) == Choice(2, 3, 1)
    with schedule.forced(split=1):
        assert choose(sizes).split == 1
    with schedule.forced(split=3):  # does not divide the group
        assert choose(sizes).split in splits(sizes)
    assert choose(sizes) == schedule._best(sizes)


def test_every_block_has_its_programs(seed: int) -> None:
    """The kernel's own order of programs, in the model of the machine."""
    pytest.importorskip("triton.experimental.gluon", reason="Gluon came with Triton 3.6")
    from types import SimpleNamespace

    from hopper_model import BACKWARD_FILES, Model, Value

    names = Model("hopper_backward", BACKWARD_FILES).names
    rng = random.Random(seed)
    for _ in range(20):
        batch, kv_heads, group, n = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 2, 4)), rng.randint(1, 9)
        sizes = Sizes(batch, kv_heads, group, n * 128, n * 128, 128, True, processors=rng.choice((4, 132)))
        choice = rng.choice(candidates(sizes, splits(sizes)))
        integers = {
            "batch": batch, "kv_heads": kv_heads, "heads": kv_heads * group, "blocks": n, "split": choice.split,
            "share": group // choice.split, "section": choice.section, "sections": choice.sections,
        }  # fmt: skip
        shape = SimpleNamespace(**{name: Value(x) for name, x in integers.items()})
        programs = n * batch * kv_heads * choice.split
        found = [tuple(int(x) for x in names["block_of"](Value(i), shape, None)) for i in range(programs)]
        share = group // choice.split
        assert sorted(found) == [
            (block, b, h, h * group + part * share)
            for block in range(n) for b in range(batch) for h in range(kv_heads) for part in range(choice.split)
        ]  # fmt: skip
