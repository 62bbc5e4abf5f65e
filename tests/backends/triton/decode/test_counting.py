"""Splits that the last program of a tile combines: when it does, and that it leaves its counters as it found them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BF16, FP32, Case, check, make
from torch import Tensor

import fastattn
from fastattn.backends.triton.decode import counting, forward
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.call import Problem

CASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=3, kv_len=75, head_dim=24, dtype=FP32, return_lse=True, sinks=FP32)
PROBLEM = Problem(
    device="cuda", index=0, capability=(9, 0), dtype=BF16, batch=1, q_heads=32, kv_heads=8, q_len=1, kv_len=8192,
    head_dim=128, value_dim=128, mask="none", mask_shape=(), mask_dtype=None, left=-1, right=0, softcap=0.0,
    sinks=False, q_lengths=False, kv_lengths=False, return_lse=False, grads="",
)  # fmt: skip


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What calls got. It holds NaN: what no split wrote must not be read."""
    found: list[tuple[Tensor, Tensor]] = []

    def counted(device: torch.device, size: int, count: int, stream: int) -> tuple[Tensor, Tensor]:
        parts = torch.full((size // 4,), torch.nan, device=device).view(torch.uint8)
        found.append((parts, torch.zeros(count, dtype=torch.int32, device=device)))
        return found[-1]

    monkeypatch.setattr(forward, "counted", counted)
    return found


@pytest.mark.parametrize("at_once", [16, 512, 4096])
@pytest.mark.parametrize("lengths", [(75, 75), (20, 0), (0, 33)], ids=str)
def test_rounds_of_rows_and_splits(
    at_once: int,
    lengths: tuple[int, int],
    device: str,
    force: Callable[..., None],
    memory: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One split at a time, some, and all; 12 rows, 4 at a time; splits without work leave their memory as it was."""
    monkeypatch.setattr(counting, "AT_ONCE", at_once)
    monkeypatch.setattr(counting, "AT_ONCE_ALONE", at_once)
    monkeypatch.setattr(counting, "MOST_ROUNDS", 100)
    force(splits=5, block_n=16)
    check(CASE.but(kv_lengths=lengths, mask="causal"), "decode", device)
    assert memory and not any(counters.any() for _, counters in memory)
    assert {len(counters) for _, counters in memory} == {CASE.batch * CASE.kv_heads}


def test_bits_repeat(device: str, force: Callable[..., None], memory: list[Any]) -> None:
    force(splits=5, block_n=16)
    x = make(CASE, device)
    one, *others = (fastattn.scaled_dot_product_attention(x.q, x.k, x.v, backend="decode") for _ in range(3))
    assert len(memory) == 3 and all(torch.equal(one, other) for other in others)


def chosen(p: Problem) -> tuple[launch.Launch, bool]:
    found = launch.choose(p, 132)
    return found, counting.counts(p, found, forward._is_large(p, found))


def test_few_rows_and_splits_are_one_launch() -> None:
    found, counts = chosen(PROBLEM)
    assert (found.splits, counting.steps(PROBLEM)) == (16, (4, 128, 8))
    assert counts and counting.combines(PROBLEM, found)
    assert counting.combines(PROBLEM, replace(found, splits=32))
    assert not counting.combines(PROBLEM, replace(found, splits=33)), "a fifth round"
    wide_group = replace(PROBLEM, q_heads=64, kv_heads=4)
    assert counting.steps(wide_group) == (16, 128, 2)
    assert not counting.combines(wide_group, launch.choose(wide_group, 132)), "33 splits, two at a time"
    assert counting.steps(replace(PROBLEM, capability=(8, 0))) == (4, 128, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_len": 100, "kv_len": 1 << 15},
        {"q_heads": 64, "kv_heads": 1},
        {"q_heads": 128, "kv_heads": 1},
        {"q_heads": 8, "kv_heads": 1, "head_dim": 512, "value_dim": 512},
        {"batch": 64},
    ],
    ids=["chunk", "Hopper's products", "blocks of rows", "wide heads", "one split"],
)
def test_other_kernels_cannot_count(changes: dict[str, Any]) -> None:
    assert not chosen(replace(PROBLEM, **changes))[1]


def test_whether_a_kernel_counts_follows_from_no_length() -> None:
    """Else a growing cache would wait for another binary."""
    found = {chosen(replace(PROBLEM, kv_len=n))[1] for n in range(1, 20000, 17)}
    assert found == {True}
