"""The plan cache: bounded, counted, and a plan is built once. (No GPU: plans are counted, not built.)"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastattn.backends.cudnn import plans
from fastattn.backends.cudnn.graphs import Operand, PlanKey


def key(length: int) -> PlanKey:
    return PlanKey("forward", 0, (Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16),))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PlanKey]:
    found: list[PlanKey] = []

    def build(key: PlanKey) -> object:
        time.sleep(0.005)
        found.append(key)
        if key.operands[0].dims[2] == 13:
            raise plans.PlanError("cuDNN refuses 13")
        return object()

    monkeypatch.setattr(plans.Plan, "build", staticmethod(build))
    return found


def test_a_plan_is_built_once_and_found_again(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    first = cache.get(key(1))
    assert cache.get(key(1)) is first and len(built) == 1
    assert cache.get(key(2)) is not first and len(built) == 2
    stats = cache.stats()
    assert (stats["plans"], stats["builds"], stats["hits"], stats["evictions"]) == (2, 2, 1, 0)
    assert stats["build_ms"] >= 10


def test_the_least_recently_used_plan_goes(built: list[PlanKey]) -> None:
    cache = plans.PlanCache(capacity=3)
    for length in (1, 2, 3):
        cache.get(key(length))
    cache.get(key(1))
    cache.get(key(4))
    assert cache.stats()["evictions"] == 1
    built.clear()
    for length in (1, 3, 4):
        cache.get(key(length))
    assert built == []
    cache.get(key(2))
    assert built == [key(2)]


def test_threads_that_want_the_same_plan_wait_for_one_build(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    barrier = threading.Barrier(8)

    def ask(i: int) -> object:
        barrier.wait()
        return cache.get(key(i % 2))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(built) == 2 and len(set(map(id, found))) == 2


def test_a_refused_plan_raises_and_leaves_the_cache_usable(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    for _ in range(2):
        with pytest.raises(plans.PlanError, match="refuses 13"):
            cache.get(key(13))
    cache.get(key(1))
    assert cache.stats()["plans"] == 1


def test_clear_forgets_plans_and_keeps_the_counters(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    cache.get(key(1))
    cache.clear()
    assert cache.stats()["plans"] == 0 and cache.stats()["builds"] == 1
    cache.get(key(1))
    assert len(built) == 2
