"""What ranks hold, compute and send."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastattn import Intervals, Segments
from fastattn.parallel.layout import ORDERS, Layout
from fastattn.parallel.plan import Pattern, Plan

CPU = torch.device("cpu")


def plan(ranks: int, rank: int, length: int = 64, order: str = "head-tail", **pattern: object) -> Plan:
    return Plan(Layout(length, ranks, order), rank, Pattern(length, 1, **pattern), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length, ranks", [(64, 4), (61, 4), (3, 4), (0, 2), (7, 1)])
def test_a_layout_gives_every_token_to_one_rank(length: int, ranks: int, order: str) -> None:
    layout = Layout(length, ranks, order)
    x = torch.arange(length)
    parts = [layout.take(x, 0, rank) for rank in range(ranks)]
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    assert torch.equal(layout.join(parts, 0), x)
    for rank, part in enumerate(parts):
        assert torch.equal(part, layout.positions(rank)) and len(part) == layout.size(rank)
    sizes = [layout.size(rank) for rank in range(ranks)]
    assert max(sizes) - min(sizes) <= layout.per_rank


def test_a_causal_ring_makes_one_plain_call_per_step() -> None:
    for rank in range(4):
        steps = plan(4, rank, right=0).steps
        kinds = [[(block.mask, block.window) for block in step.blocks] for step in steps]
        assert kinds == [[("causal", None)]] + [[(None, None)]] * 3
        work = [block.rows.size * block.keys.size for step in steps[1:] for block in step.blocks]
        assert len(set(work)) == 1  # the same in every step, and so on every rank


def test_a_causal_gathering_makes_two_causal_calls() -> None:
    found = plan(4, 1, right=0)
    assert [(b.mask, b.window, b.rows.size, b.keys.stop) for b in found.whole] == [
        ("causal", None, 8, 16),
        ("causal", None, 8, 56),
    ]
    squares = [b for b in found.whole_backward if b.mask == "causal"]
    assert all(b.rows.size == b.keys.size for b in squares) and len(squares) == 2


def test_full_attention_is_one_call_per_step() -> None:
    assert all([block.mask for block in step.blocks] == [None] for step in plan(4, 2).steps)


@pytest.mark.parametrize("order", ORDERS)
def test_windows_send_only_what_is_needed(order: str) -> None:
    left, chunk = 5, 64 // (8 if order == "head-tail" else 4)
    for rank in range(4):
        found = plan(4, rank, order=order, left=left, right=0)
        received = [b - a for step in found.steps[1:] for a, b in step.receive]
        # The chunk before each own one, its last `left` tokens; none where that is an own one or there is none.
        starts = [c.start for c in found.layout.held(rank)]
        foreign = [s for s in starts if s and s - chunk not in starts]
        assert received == [left] * len(foreign)
        assert all(block.mask is None or block.mask == "causal" for step in found.steps for block in step.blocks)


@pytest.mark.parametrize("pattern", [{"right": 0}, {}, {"left": 9, "right": 0}, {"left": 3, "right": 4}])
def test_what_one_rank_sends_is_what_the_other_waits_for(pattern: dict[str, int]) -> None:
    plans = [plan(5, rank, length=83, **pattern) for rank in range(5)]
    for rank, mine in enumerate(plans):
        for step in mine.steps:
            other = next(s for s in plans[step.target].steps if s.source == rank)
            assert step.send == other.receive


def test_packed_sequences_become_segments_or_plain_calls() -> None:
    cuts = [0, 20, 23, 40, 64]
    table = tuple((0, a, b) for a, b in pairwise(cuts))
    for rank in range(4):
        found = plan(4, rank, right=0, segments=table)
        masks = [block.mask for step in found.steps for block in step.blocks]
        assert not any(isinstance(mask, Intervals) for mask in masks)
        for i, step in enumerate(found.steps):
            # Between chunks there is one segment at the most.
            assert i == 0 or not any(isinstance(block.mask, Segments) for block in step.blocks)


def test_head_tail_balances_causal_work() -> None:
    def work(order: str) -> list[int]:
        lo, hi = Pattern(4096, 1, right=0).bounds()
        layout = Layout(4096, 8, order)
        return [int((hi - lo)[0, layout.positions(rank)].sum()) for rank in range(8)]

    balanced, lopsided = work("head-tail"), work("contiguous")
    assert max(balanced) == min(balanced)
    assert max(lopsided) > 10 * min(lopsided)
