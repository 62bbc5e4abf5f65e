"""The plan cache: bounded, counted, and a plan is built once. (No GPU: plans are counted, not built.)"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.backends.cudnn import plan_cache as plans
from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.worker import Worker
from fastattn.common import notice


def key(length: int) -> PlanKey:
    """Of a call with gradients, of which it has the log-sum-exp."""
    operands = [Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16)]
    operands.append(Operand("stats", (1, 1, length, 1), (length, length, 1, 1), torch.float32))
    return PlanKey("forward", 0, tuple(operands))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PlanKey]:
    found: list[PlanKey] = []
    monkeypatch.setattr(plans.Plan, "load", staticmethod(lambda key: None))

    def build(key: PlanKey) -> SimpleNamespace:
        time.sleep(0.005)
        found.append(key)
        if key.operands[0].dims[2] == 13:
            raise plans.PlanError("cuDNN refuses 13")
        return SimpleNamespace(store=lambda: None)

    monkeypatch.setattr(plans.Plan, "build", staticmethod(build))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plans, "OCCASION", 0.0)
    monkeypatch.setattr(plans, "DELAY", 0.01)
    return found


def test_a_plan_is_built_once_and_found_again(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    first = cache.get(key(1))
    assert cache.get(key(1)) is first and len(built) == 1
    assert cache.get(key(2)) is not first and len(built) == 2
    stats = cache.stats()
    assert (stats["plans"], stats["builds"], stats["evictions"]) == (2, 2, 0)
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
    assert not cache._building
    cache.get(key(1))
    assert cache.stats()["plans"] == 1


def test_clear_forgets_plans_and_keeps_the_counters(built: list[PlanKey]) -> None:
    cache = plans.PlanCache()
    cache.get(key(1))
    cache.clear()
    assert cache.stats()["plans"] == 0 and cache.stats()["builds"] == 1
    cache.get(key(1))
    assert len(built) == 2


def test_an_exact_plan_that_keeps_being_missed_is_built_in_the_background(
    built: list[PlanKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = plans.PlanCache()
    exact, general = key(100), key(0)
    found = [cache.best(exact, general, trained=True) for _ in range(plans.EXACT_AFTER)]
    assert found == [cache.get(general)] * plans.EXACT_AFTER, "nobody waits for it"
    assert cache.wait(10)
    assert built == [general, exact]
    assert cache.best(exact, general) is cache.get(exact)
    stats = cache.stats()
    assert (stats["builds"], stats["background_builds"], stats["background_failures"]) == (1, 1, 0)
    assert stats["background_build_ms"] >= 5


def test_what_serves_is_built_for_later_than_what_trains(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a plan is built other threads stand still at times: that has to pay."""
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = plans.PlanCache()
    for exact in (key(100), dataclasses.replace(key(101), operands=key(101).operands[:1])):  # with statistics, without
        built.clear()
        cache.clear()
        for _ in range(plans.SERVED_AFTER - 1):
            cache.best(exact, key(0))
        assert cache.wait(10) and built == [key(0)]
        cache.best(exact, key(0))
        assert cache.wait(10) and built == [key(0), exact]


def test_the_layers_of_a_model_are_one_occasion(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(plans, "OCCASION", 60.0)
    cache = plans.PlanCache()
    for _ in range(100):
        cache.best(key(100), key(0), trained=True)
    assert cache.wait(10)
    assert built == [key(0)]


def test_deterministic_algorithms_stay_with_one_plan(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = plans.PlanCache()
    cache.get(key(100))
    torch.use_deterministic_algorithms(True)
    try:
        assert cache.best(key(100), key(0)) is cache.get(key(0))
    finally:
        torch.use_deterministic_algorithms(False)
    assert cache.best(key(100), key(0)) is cache.get(key(100))


def test_a_shape_that_does_not_come_back_is_not_built(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = plans.PlanCache()
    for length in range(20, 60):
        for _ in range(plans.EXACT_AFTER - 1):
            cache.best(key(length), key(0), trained=True)
    assert cache.wait(10)
    assert built == [key(0)]


@pytest.mark.parametrize("policy, expected", [("exact", [100]), ("any", [0])])
def test_policy(policy: str, expected: list[int], built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_PLANS", policy)
    cache = plans.PlanCache()
    for _ in range(5):
        cache.best(key(100), key(0))
    assert cache.wait(10)
    assert built == [key(length) for length in expected]


def test_a_background_failure_is_reported_once_and_not_repeated(
    built: list[PlanKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(notice, "_given", set())
    cache = plans.PlanCache()
    with pytest.warns(fastattn.FastattnWarning, match="could not be built in the background.*FASTATTN_PLANS=any"):
        for _ in range(10):
            cache.best(key(13), key(0), trained=True)
        assert cache.wait(10)
    assert built.count(key(13)) == 1
    assert cache.stats()["background_failures"] == 1
    assert cache.get(key(0)) is cache.best(key(13), key(0)), "calls go on"


def test_a_task_waits_for_its_time_and_holds_nobody_up() -> None:
    finished: list[tuple[str, float]] = []
    worker = Worker()
    start = time.monotonic()
    worker.submit(lambda: finished.append(("late", time.monotonic())), delay=0.2)
    worker.submit(lambda: finished.append(("soon", time.monotonic())))
    assert worker.wait(5)
    assert [name for name, _ in finished] == ["soon", "late"]
    assert finished[0][1] - start < 0.15
    assert 0.2 <= finished[1][1] - start < 2


def test_a_worker_finishes_what_it_holds_and_drops_the_rest() -> None:
    started, finished = threading.Event(), []

    def work(item: int) -> None:
        started.set()
        time.sleep(0.05)
        finished.append(item)

    worker = Worker()
    for i in range(5):
        worker.submit(partial(work, i))
    assert started.wait(5)
    assert not worker.wait(0.001)
    worker.stop()
    worker.submit(partial(work, 9))
    assert finished == [0]
    assert worker.wait(1)


def test_a_task_that_raises_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    worker, done = Worker(), threading.Event()
    worker.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    worker.submit(done.set)
    assert done.wait(5)
    assert worker.wait(5)
    assert "a background task failed" in caplog.text


def test_a_miss_inside_a_capture_does_not_count(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = plans.PlanCache()
    cache.best(key(100), key(0), trained=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cache.best(key(100), key(0), trained=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cache.wait(10)
    assert built == [key(0)]
    cache.best(key(100), key(0), trained=True)
    assert cache.wait(10)
    assert built == [key(0), key(100)]


def test_a_forked_child_has_a_worker_of_its_own() -> None:
    worker = Worker()
    worker.submit(lambda: None)
    assert worker.wait(5)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        worker.submit(done.set)
        os._exit(0 if done.wait(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_exact_plan_from_disk_is_there_after_the_first_miss(
    built: list[PlanKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(plans.Plan, "load", staticmethod(lambda k: SimpleNamespace(k=k) if k == key(100) else None))
    cache = plans.PlanCache()
    assert cache.best(key(100), key(0)) is cache.get(key(0))
    assert cache.wait(10)
    assert cache.best(key(100), key(0)) is cache.get(key(100))
    assert built == [key(0)]
    assert cache.stats()["disk_loads"] == 1
