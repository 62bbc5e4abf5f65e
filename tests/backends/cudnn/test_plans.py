"""Plans: bounded, counted, each built once, static ones in the background. (No GPU: plans are counted, not built.)"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.plan import PlanError
from fastattn.backends.cudnn.plan_policy import SERVED_AFTER, TRAINED_AFTER, Action, Candidates, State
from fastattn.backends.cudnn.plans import Plans
from fastattn.common import notice


def key(length: int) -> PlanKey:
    """Of a call with gradients, of which it has the log-sum-exp."""
    operands = [Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16)]
    operands.append(Operand("stats", (1, 1, length, 1), (length, length, 1, 1), torch.float32))
    return PlanKey("forward", 0, tuple(operands))


class Made(Plans):
    """Plans of a test's own, whose builds are counted."""

    def __init__(self, **options: Any) -> None:
        self.built: list[PlanKey] = []
        super().__init__(**({"load": lambda key: None, "build": self.build, "occasion": 0.0, "delay": 0.01} | options))

    def build(self, key: PlanKey) -> Any:
        time.sleep(0.005)
        self.built.append(key)
        if key.operands[0].dims[2] == 13:
            raise PlanError("cuDNN refuses 13")
        return SimpleNamespace(store=lambda: None)


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the machine's, no capture."""
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def plans() -> Made:
    return Made()


def test_a_plan_is_built_once_and_found_again(plans: Made) -> None:
    first = plans.get(key(1))
    assert plans.get(key(1)) is first and len(plans.built) == 1
    assert plans.get(key(2)) is not first and len(plans.built) == 2
    stats = plans.stats()
    assert (stats["plans"], stats["builds"], stats["evictions"]) == (2, 2, 0)
    assert stats["build_ms"] >= 10


def test_the_least_recently_used_plan_goes(plans: Made) -> None:
    plans = Made(capacity=3)
    for length in (1, 2, 3):
        plans.get(key(length))
    plans.get(key(1))
    plans.get(key(4))
    assert plans.stats()["evictions"] == 1
    plans.built.clear()
    for length in (1, 3, 4):
        plans.get(key(length))
    assert plans.built == []
    plans.get(key(2))
    assert plans.built == [key(2)]


def test_threads_that_want_the_same_plan_wait_for_one_build(plans: Made) -> None:
    barrier = threading.Barrier(8)

    def ask(i: int) -> object:
        barrier.wait()
        return plans.get(key(i % 2))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(plans.built) == 2 and len(set(map(id, found))) == 2


def test_a_refused_plan_raises_and_leaves_the_cache_usable(plans: Made) -> None:
    for _ in range(2):
        with pytest.raises(PlanError, match="refuses 13"):
            plans.get(key(13))
    assert not plans.cache._building
    plans.get(key(1))
    assert plans.stats()["plans"] == 1


def test_clear_forgets_plans_and_keeps_the_counters(plans: Made) -> None:
    plans.get(key(1))
    plans.clear()
    assert plans.stats()["plans"] == 0 and plans.stats()["builds"] == 1
    plans.get(key(1))
    assert len(plans.built) == 2


def test_a_static_plan_that_keeps_being_missed_is_built_in_the_background(
    plans: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    static, dynamic = key(100), key(0)
    found = [plans.best(static, dynamic, trained=True) for _ in range(TRAINED_AFTER)]
    assert found == [plans.get(dynamic)] * TRAINED_AFTER, "nobody waits for it"
    assert plans.wait(10)
    assert plans.built == [dynamic, static]
    assert plans.best(static, dynamic) is plans.get(static)
    stats = plans.stats()
    assert (stats["builds"], stats["background_builds"], stats["background_failures"]) == (1, 1, 0)
    assert stats["background_build_ms"] >= 5


def test_what_serves_is_built_for_later_than_what_trains(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a plan is built other threads stand still at times: that has to pay."""
    for static in (key(100), dataclasses.replace(key(101), operands=key(101).operands[:1])):  # with statistics, without
        plans.built.clear()
        plans.clear()
        for _ in range(SERVED_AFTER - 1):
            plans.best(static, key(0))
        assert plans.wait(10) and plans.built == [key(0)]
        plans.best(static, key(0))
        assert plans.wait(10) and plans.built == [key(0), static]


def test_the_layers_of_a_model_are_one_occasion(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Made(occasion=60.0)
    for _ in range(100):
        plans.best(key(100), key(0), trained=True)
    assert plans.wait(10)
    assert plans.built == [key(0)]


def test_deterministic_algorithms_stay_with_one_plan(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plans.get(key(100))
    torch.use_deterministic_algorithms(True)
    try:
        assert plans.best(key(100), key(0)) is plans.get(key(0))
    finally:
        torch.use_deterministic_algorithms(False)
    assert plans.best(key(100), key(0)) is plans.get(key(100))


def test_a_shape_that_does_not_come_back_is_not_built(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(20, 60):
        for _ in range(TRAINED_AFTER - 1):
            plans.best(key(length), key(0), trained=True)
    assert plans.wait(10)
    assert plans.built == [key(0)]


@pytest.mark.parametrize("policy, expected", [("static", [100]), ("dynamic", [0]), ("exact", [100]), ("any", [0])])
def test_policy(policy: str, expected: list[int], plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_PLANS", policy)
    for _ in range(5):
        plans.best(key(100), key(0))
    assert plans.wait(10)
    assert plans.built == [key(length) for length in expected]


def test_a_background_failure_is_reported_once_and_not_repeated(
    plans: Made, monkeypatch: pytest.MonkeyPatch, fresh_warnings: None
) -> None:
    with pytest.warns(fastattn.FastattnWarning, match="could not be built in the background.*FASTATTN_PLANS=dynamic"):
        for _ in range(10):
            plans.best(key(13), key(0), trained=True)
        assert plans.wait(10)
    assert plans.built.count(key(13)) == 1
    assert plans.stats()["background_failures"] == 1
    assert plans.get(key(0)) is plans.best(key(13), key(0)), "calls go on"


def test_a_miss_inside_a_capture_does_not_count(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plans.best(key(100), key(0), trained=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plans.best(key(100), key(0), trained=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert plans.wait(10)
    assert plans.built == [key(0)]
    plans.best(key(100), key(0), trained=True)
    assert plans.wait(10)
    assert plans.built == [key(0), key(100)]


def test_a_static_plan_from_disk_is_there_after_the_first_miss(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Made(load=lambda k: SimpleNamespace(k=k) if k == key(100) else None)
    assert plans.best(key(100), key(0)) is plans.get(key(0))
    assert plans.wait(10)
    assert plans.best(key(100), key(0)) is plans.get(key(100))
    assert plans.built == [key(0)]
    assert plans.stats()["disk_loads"] == 1


# States.


def test_the_states_of_a_plan(plans: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Made(delay=60.0)
    candidates = plans.candidates
    assert candidates.state(key(100)) is None
    plans.best(key(100), key(0), trained=True)
    assert candidates.state(key(100)) is State.MISSED
    plans.best(key(100), key(0), trained=True)
    assert candidates.state(key(100)) is State.QUEUED
    plans._build(key(100))
    assert candidates.state(key(100)) is State.READY
    plans.candidates.wanted(key(13))
    monkeypatch.setattr(notice, "_given", {"background build"})
    plans._build(key(13))
    assert candidates.state(key(13)) is State.FAILED
    plans.clear()
    assert candidates.state(key(100)) is None


def test_a_plan_is_being_built_while_it_is_built() -> None:
    seen: list[State | None] = []

    class Watching(Made):
        def build(self, key: PlanKey) -> Any:
            seen.append(self.candidates.state(key))
            return super().build(key)

    plans = Watching()
    for _ in range(TRAINED_AFTER):
        plans.best(key(100), key(0), trained=True)
    assert plans.wait(10)
    assert seen == [None, State.BUILDING], "the dynamic plan is nobody's candidate"


def test_a_forked_child_builds_what_its_parent_had_queued() -> None:
    candidates = Candidates(occasion=0.0)
    for _ in range(TRAINED_AFTER):
        candidates.missed(key(100), trained=True)
    assert candidates.state(key(100)) is State.QUEUED
    child = os.fork()
    if child == 0:
        again = candidates.state(key(100)) is State.MISSED and candidates.missed(key(100), True) is Action.BUILD
        os._exit(0 if again else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert candidates.state(key(100)) is State.QUEUED
