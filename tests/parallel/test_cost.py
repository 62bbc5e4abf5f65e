"""The cost model: what it must get right to be of use, and what "auto" makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ranks import Ranks

from fastattn.parallel import ContextParallel, Work, predict
from fastattn.parallel.cost import HOPPER, STRATEGIES, cheapest, single


def work(length: int, ranks: int, **options: object) -> Work:
    return Work.of(length, ranks, q_heads=32, kv_heads=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_sequence_scales_and_a_short_one_does_not(strategy: str, backward: bool) -> None:
    long, short = work(1 << 20, 8, backward=backward), work(256, 8, backward=backward)
    assert 6.5 < single(long) / predict(long, 8, strategy).total <= 8.0
    assert single(short) < predict(short, 8, strategy).total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_sends_nothing(strategy: str) -> None:
    found = predict(work(8192, 1), 1, strategy)
    assert found.received == found.exposed == 0
    assert found.compute == pytest.approx(single(work(8192, 1)), rel=0.05)


@pytest.mark.parametrize("backward", [False, True])
def test_bytes_are_those_that_the_strategies_send(backward: bool) -> None:
    """Counted by hand for 4 ranks, 1024 tokens, bf16: K and V of a rank are 1 MiB, q is 2 MiB."""
    mebibyte, found = 1 << 20, {}
    for strategy in STRATEGIES:
        found[strategy] = predict(work(1024, 4, backward=backward), 4, strategy).received / mebibyte
    # Three other ranks' K and V; their gradients in float32 are twice that, and in the backward they come again.
    assert found["allgather"] == pytest.approx(3 + (3 + 6) * backward)
    # The causal ring needs three quarters; gradients go back in bf16.
    assert found["ring"] == pytest.approx(0.75 * (3 + 6 * backward))
    # q, output and K, V: three quarters of each leave.
    assert found["ulysses"] == pytest.approx((2 + 2 + 1) * 0.75 * (1 + backward))


def test_a_ring_hides_what_it_sends_behind_long_blocks_only() -> None:
    slow = replace(HOPPER, link=2e9)
    long, short = (predict(work(n, 8), 8, "ring", slow) for n in (1 << 20, 1 << 13))
    assert long.exposed < 0.1 * long.communication
    assert short.exposed > 0.5 * short.communication


def test_hosts_apart_cost_more() -> None:
    for strategy in STRATEGIES:
        near, far = (predict(work(1 << 17, 16), 16, strategy, HOPPER, hosts) for hosts in (16, 8))
        assert far.communication > near.communication or strategy == "allgather"  # which uses all of a host's network
        assert far.communication >= near.communication


def test_a_window_needs_little_and_says_so() -> None:
    narrow, wide = work(1 << 17, 8, window=4096), work(1 << 17, 8)
    assert narrow.pairs < wide.pairs / 10
    assert predict(narrow, 8, "ring").received < predict(wide, 8, "ring").received / 5
    assert cheapest(work(1 << 20, 8, window=4096), 8, replace(HOPPER, link=20e9)) == "ring"


def test_it_is_predicted_to_be_what_was_measured_on_one_gpu() -> None:
    """Forward times on an H100, ms, 32/8 heads of 128, causal, bf16."""
    for length, ms in ((2048, 0.085), (4096, 0.26), (8192, 0.96), (16384, 3.55)):
        assert single(work(length, 1)) * 1e3 == pytest.approx(ms, rel=0.35)


def test_no_such_strategy() -> None:
    with pytest.raises(ValueError, match="strategy: expected one of ulysses, ring, allgather"):
        predict(work(64, 2), 2, "telepathy")


def choices() -> list[str]:
    import torch

    q, k = torch.randn(1, 4, 32, 8), torch.randn(1, 3, 32, 8)
    q6 = torch.randn(1, 6, 32, 8)
    found = []
    for hardware in (HOPPER, replace(HOPPER, link=1e6, latency=0.0)):
        cp = ContextParallel(hardware=hardware)
        found.append(cp.chosen(q, q, q, length=64, mask="causal"))
        found.append(cp.chosen(q6, k, k, length=64, mask="causal"))
    return [*found, cp.chosen(q, q, q, length=64, mask="causal", strategy="ring")]


def test_auto_is_the_same_on_every_rank_and_possible(two: Ranks) -> None:
    first, second = two.run(choices)
    assert first == second
    assert set(first) <= set(STRATEGIES)
    assert first[1] != "ulysses" and first[3] != "ulysses"  # three K/V heads on two ranks
    assert first[2] != first[0] or first[3] != first[1] or first[0] == "ring"
    assert first[-1] == "ring"
