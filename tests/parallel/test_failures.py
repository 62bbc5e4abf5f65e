"""Ranks that die, hang, or make another call than the rest: an error that says so, in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastattn.parallel import ContextParallel

PATIENCE = 3.0  #: the group's timeout


def attend_until_it_fails(how: str, strategy: str) -> dict[str, Any]:
    """Rank 1 dies or hangs after a few calls. What the others found, and how long it took them to find it."""
    cp = ContextParallel(strategy=strategy)
    q = torch.randn(1, 6, 8, 8)
    begin = time.monotonic()
    try:
        for i in range(200):
            if i == 3:
                begin = time.monotonic()
                if dist.get_rank() == 1 and how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if dist.get_rank() == 1:
                    time.sleep(3 * PATIENCE)
                    return {}
            cp.attention(q, q, q, length=8 * cp.size, mask="causal")
    except RuntimeError as error:
        return {"seconds": time.monotonic() - begin, "error": str(error), "notes": " ".join(error.__notes__)}
    return {}


@pytest.mark.parametrize(
    "how, strategy", [("dies", "ring"), ("dies", "allgather"), ("dies", "ulysses"), ("hangs", "ring")]
)
def test_a_lost_rank_ends_the_others(how: str, strategy: str, tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path, seconds=PATIENCE)
    try:
        answers = ranks.answers(attend_until_it_fails, how, strategy)
    finally:
        ranks.stop()
    assert answers[1] == ("it died" if how == "dies" else {})
    for rank in (0, 2):
        assert answers[rank]["seconds"] < 30, answers[rank]
        assert "another rank died, hung" in answers[rank]["notes"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks under FASTATTN_DEBUG=1."""
    ranks = Ranks(2, tmp_path_factory.mktemp("checked"), FASTATTN_DEBUG="1")
    yield ranks
    ranks.stop()


def differ(what: str) -> list[str]:
    """Rank 1 makes another call; then both the same."""
    cp, odd = ContextParallel(strategy="ring"), dist.get_rank() == 1
    heads, tokens = (8 if odd and what == "heads" else 4), (9 if odd and what == "tokens" else 8)
    dtype = torch.float64 if odd and what == "dtype" else torch.float32
    q = torch.randn(1, heads, tokens, 8, dtype=dtype)
    length = 14 if odd and what == "length" else 16
    options: dict[str, Any] = {"mask": None if odd and what == "mask" else "causal"}
    if odd and what == "strategy":
        options["strategy"] = "allgather"
    said = []
    try:
        cp.attention(q, q, q, length=length, **options)
    except ValueError as error:
        said.append(str(error))
    same = torch.randn(1, 4, 8, 8)
    cp.attention(same, same, same, length=16, mask="causal")
    return said


@pytest.mark.parametrize(
    "what, name",
    [
        ("heads", "q: rank 0: [1, 4, tokens, 8] float32 on cpu, rank 1: [1, 8, tokens, 8] float32 on cpu"),
        ("dtype", "rank 1: [1, 4, tokens, 8] float64"),
        ("tokens", "q: expected the 8 of 16 tokens that rank 1 of 2 holds (head-tail), got 9"),
        ("length", "length|tokens"),
        ("mask", "mask and window: "),
        ("strategy", "strategy: rank 0: ring, rank 1: allgather"),
    ],
)
def test_ranks_that_differ_are_named_on_every_rank(what: str, name: str, checked: Ranks) -> None:
    for said in checked.run(differ, what):
        assert len(said) == 1
        assert "do not make the same call" in said[0]
        assert any(part in said[0] for part in name.split("|")), said[0]
