"""Which plan serves a call: the choice, and what it asks of the plans. (No GPU: plans are counted, not built.)"""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import a_problem

from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.plan_policy import OCCASION, SERVED_AFTER, TRAINED_AFTER, policy
from fastattn.backends.cudnn.plans import PlanChoice, Plans


def key(length: int) -> PlanKey:
    """Of a call whose log-sum-exp is asked for, with or without gradients: the key does not tell."""
    operands = [Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16)]
    operands.append(Operand("stats", (1, 1, length, 1), (length, length, 1, 1), torch.float32))
    return PlanKey("forward", 0, tuple(operands))


DYNAMIC, STATIC = key(0), key(100)


PROBLEM = a_problem(dtype=torch.float16, q_heads=4, kv_heads=2, q_len=5, kv_len=5, head_dim=8, value_dim=8)


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Made(Plans):
    """Plans of a test's own, whose builds are counted."""

    def __init__(self, clock: Clock, delay: float = 0.0) -> None:
        self.built: list[PlanKey] = []
        self.asked: list[PlanKey | None] = []  #: once for each call of `best`
        super().__init__(4, load=lambda key: None, build=self.build, clock=clock.monotonic, delay=delay)

    def build(self, key: PlanKey) -> Any:
        self.built.append(key)
        return SimpleNamespace(key=key, store=lambda: None)

    def best(self, static: PlanKey | None, *others: Any) -> Any:
        self.asked.append(static)
        return super().best(static, *others)


@pytest.fixture
def plans(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Made(clock)


def test_a_choice_asks_the_cache_once(plans: Made, clock: Clock) -> None:
    choice = PlanChoice(plans, None, DYNAMIC)
    plan, is_static = choice.plan()
    assert plan.key == DYNAMIC and not is_static
    choice.plan()  # to build the plan changed the cache
    plans.asked.clear()
    for _ in range(5):
        clock.now += 100
        assert choice.plan() == (plan, False)
    assert plans.asked == [], "without an static plan to wait for there is nothing to ask"


def test_each_change_of_the_cache_is_noticed(plans: Made, clock: Clock) -> None:
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    plans.get(STATIC)
    static, is_static = choice.plan()
    assert is_static and static.key == STATIC
    plans.asked.clear()
    choice.plan()
    assert plans.asked == []
    plans.get(key(1))  # one comes
    assert choice.plan()[0] is static and len(plans.asked) == 1
    plans.clear()
    plans.asked.clear()
    plan, is_static = choice.plan()
    assert plans.asked and not is_static and plan.key == DYNAMIC
    assert plan is plans.get(DYNAMIC)


def test_clear_plans_reaches_every_choice(plans: Made, clock: Clock) -> None:
    choices = [PlanChoice(plans, None, key(i)) for i in range(3)]
    before = [choice.plan()[0] for choice in choices]
    plans.built.clear()
    plans.clear()
    after = [choice.plan()[0] for choice in choices]
    assert plans.built == [key(i) for i in range(3)]
    assert not any(x is y for x, y in zip(before, after))
    assert [choice.plan()[0] for choice in choices] == after and len(plans.built) == 3


def test_a_change_of_policy_is_noticed(plans: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)

    def found() -> tuple[PlanKey, bool]:
        plan, is_static = choice.plan()
        return plan.key, is_static

    assert found() == (DYNAMIC, False)
    monkeypatch.setenv("FASTATTN_PLANS", "static")
    assert found() == (STATIC, True)
    monkeypatch.setenv("FASTATTN_PLANS", "dynamic")
    assert found() == (DYNAMIC, False)
    monkeypatch.delenv("FASTATTN_PLANS")
    assert found() == (STATIC, True), "it is there now"
    torch.use_deterministic_algorithms(True)
    try:
        assert found() == (DYNAMIC, False)
        monkeypatch.setenv("FASTATTN_PLANS", "static")
        assert found() == (STATIC, True)
        monkeypatch.delenv("FASTATTN_PLANS")
    finally:
        torch.use_deterministic_algorithms(False)
    assert found() == (STATIC, True)
    assert plans.built == [DYNAMIC, STATIC]


def test_while_the_static_plan_is_missing_its_occasions_are_counted(plans: Made, clock: Clock) -> None:
    """The model's layers within an occasion are one; a Choice that kept still would be taken for a lost interest."""
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    for _ in range(32):
        assert not choice.plan()[1]
    assert len(plans.asked) <= 3, "of 32 layers the cache hears now and then"
    clock.now += 0.9 * OCCASION
    choice.plan()
    assert plans.wait(10) and plans.built == [DYNAMIC]
    clock.now += 0.4 * OCCASION
    for _ in range(32):
        choice.plan()
    assert plans.wait(10) and plans.built == [DYNAMIC, STATIC]
    plan, is_static = choice.plan()
    assert is_static and plan.key == STATIC


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_trained_is_told_by_the_call_not_by_its_log_sum_exp(trained: bool, plans: Made, clock: Clock) -> None:
    """Sinks and return_lse ask for it as well: a stall for text that is being generated."""
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=trained)
    enough = TRAINED_AFTER if trained else SERVED_AFTER
    assert SERVED_AFTER >= 8 * TRAINED_AFTER
    for occasion in range(1, enough + 1):
        assert plans.built in ([], [DYNAMIC]), occasion
        choice.plan()
        clock.now += 2 * OCCASION
        assert plans.wait(10)
    assert plans.built == [DYNAMIC, STATIC]


def test_training_counts_what_was_served_before(plans: Made, clock: Clock) -> None:
    """The same plan serves both; it is built once."""
    served, trained = PlanChoice(plans, STATIC, DYNAMIC), PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    both = [DYNAMIC, STATIC]
    for choice, expected in (*[(served, [DYNAMIC])] * 5, *[(trained, both), (served, both)] * 20):
        choice.plan()
        clock.now += 2 * OCCASION
        assert plans.wait(10)
        assert plans.built == expected


@pytest.mark.parametrize("features, grads", [("", "qkv"), ("lse", ""), ("sinks", ""), ("sinks", "qkvs"), ("", "")])
def test_the_calls_of_cudnn_say_whether_they_train(features: str, grads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.cudnn import forward

    found: list[bool] = []
    monkeypatch.setattr(forward, "PlanChoice", lambda *keys, trained: found.append(trained))
    p = dataclasses.replace(PROBLEM, sinks=features == "sinks", return_lse=features == "lse", grads=grads)
    q, k = torch.zeros(1, 4, 5, 8, dtype=torch.float16), torch.zeros(1, 2, 5, 8, dtype=torch.float16)
    forward.UnbiasedForward(p, q, k, k)
    assert found == [bool(grads)]


@pytest.mark.parametrize("value", ["exakt", "2", "0", "static,dynamic", " "])
def test_a_policy_that_there_is_not_is_refused_by_name(
    value: str, plans: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.backends.cudnn import CudnnBackend

    monkeypatch.setenv("FASTATTN_PLANS", value)
    expected = rf"FASTATTN_PLANS: expected one of auto, static, dynamic, exact, any, got '{value}'"
    for mask in ("none", "bool"):  # of which the second takes an static plan whatever the policy is
        with pytest.raises(ValueError, match=expected):
            CudnnBackend().bind(dataclasses.replace(PROBLEM, mask=mask), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected):
        PlanChoice(plans, STATIC, DYNAMIC).plan()
    for good in ("STATIC", " dynamic ", "auto", ""):
        monkeypatch.setenv("FASTATTN_PLANS", good)
        assert policy() == (good.strip().lower() or "auto")


def test_steady_calls_reach_the_second_occasion_in_time(plans: Made, clock: Clock) -> None:
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    start = clock.now
    while not choice.plan()[1]:
        clock.now += 0.01
        assert plans.wait(10)
        assert clock.now - start < 1.5 * TRAINED_AFTER * OCCASION
    assert clock.now - start >= OCCASION


def test_the_static_plan_is_taken_as_soon_as_it_is_there(
    plans: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = threading.Event()

    class Slow(Made):
        def build(self, key: PlanKey) -> Any:
            if key == STATIC:
                assert finish.wait(10)
            return super().build(key)

    plans = Slow(clock)
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    choice.plan()
    clock.now += 2 * OCCASION
    for _ in range(3):
        assert choice.plan()[0].key == DYNAMIC, "nobody waits for it"
    finish.set()
    assert plans.wait(10)
    assert choice.plan() == (plans.get(STATIC), True), "at the next call, though the clock stands still"


def test_a_plan_in_use_is_not_evicted_before_the_others(plans: Made, clock: Clock) -> None:
    """A Choice does not go through the cache at each call; the order of use must not suffer."""
    plans.get(STATIC)
    hot, warm = PlanChoice(plans, STATIC, DYNAMIC, trained=True), PlanChoice(plans, None, key(1))
    plan = hot.plan()[0]
    for length in range(200, 230):
        for _ in range(3):
            assert hot.plan() == (plan, True)
        warm.plan()
        plans.get(key(length))
    assert plans.built.count(STATIC) == 1 and plans.built.count(key(1)) == 1
    assert plans.stats()["plans"] == plans.cache.capacity
    assert plans.stats()["evictions"] == 32 - plans.cache.capacity
    assert hot.plan()[0] is plans.get(STATIC)


def test_a_plan_that_was_evicted_is_not_kept_alive_and_comes_back(plans: Made, clock: Clock) -> None:
    plans.get(STATIC)
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    assert choice.plan()[1]
    for length in range(200, 210):
        plans.get(key(length))
    assert choice.plan()[0].key == DYNAMIC, "the static one is gone, the dynamic one was built"
    clock.now += 2 * OCCASION
    choice.plan()
    assert plans.wait(10)
    assert choice.plan()[1]


def test_a_static_plan_that_was_built_for_coming_back_and_evicted_comes_back_again(plans: Made, clock: Clock) -> None:
    """It has been asked for often enough before, and that must not count as having been refused."""
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    for round in (1, 2):
        for _ in range(2 * TRAINED_AFTER):
            choice.plan()
            clock.now += 2 * OCCASION
            assert plans.wait(10)
        assert choice.plan()[1], round
        assert plans.built.count(STATIC) == round
        for length in range(200, 210):
            plans.get(key(length))


LARGER = key(1 << 11), key(1 << 12)


def test_a_larger_plan_serves_until_the_dynamic_one_is_there(
    plans: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = Made(clock, delay=0.4)
    plans.get(LARGER[1])
    choice = PlanChoice(plans, None, DYNAMIC, lambda: LARGER)
    for _ in range(3):
        plan, is_static = choice.plan()
        assert plan.key == LARGER[1] and not is_static
    assert plans.built == [LARGER[1]], "nobody waits"
    assert plans.wait(10) and plans.built == [LARGER[1], DYNAMIC]
    assert choice.plan() == (plans.get(DYNAMIC), False), "at the next call"


def test_without_any_plan_the_dynamic_one_is_built_and_the_next_larger_one_prepared(plans: Made, clock: Clock) -> None:
    choice = PlanChoice(plans, STATIC, DYNAMIC, lambda: LARGER, trained=True)
    assert choice.plan()[0].key == DYNAMIC
    assert plans.wait(10) and plans.built == [DYNAMIC, LARGER[0]]
    assert choice.plan()[0].key == DYNAMIC, "the larger one is another length's"
    plans.clear()
    assert choice.plan()[0].key == DYNAMIC
    assert plans.wait(10) and plans.built == [DYNAMIC, LARGER[0]] * 2


def test_while_capturing_nothing_larger_is_prepared(plans: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert PlanChoice(plans, STATIC, DYNAMIC, lambda: LARGER, trained=True).plan()[0].key == DYNAMIC
    assert plans.wait(10) and plans.built == [DYNAMIC]


def test_a_dynamic_plan_that_was_evicted_is_prepared_again(plans: Made, clock: Clock) -> None:
    """While a larger one, at a cost, serves in its place."""
    choice = PlanChoice(plans, None, DYNAMIC, lambda: LARGER)
    plans.get(LARGER[0])
    for round in (1, 2):
        for _ in range(2):
            choice.plan()
            assert plans.wait(10)
        assert choice.plan()[0].key == DYNAMIC, round
        assert plans.built.count(DYNAMIC) == round
        for length in range(200, 210):
            plans.get(LARGER[0])
            plans.get(key(length))


def test_a_choice_is_every_threads(plans: Made) -> None:
    """Plans come and go and the policy stays: whatever the order, the plan is the one of a key of this choice."""
    choice = PlanChoice(plans, STATIC, DYNAMIC, trained=True)
    stop, wrong = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            plan, is_static = choice.plan()
            if plan.key != (STATIC if is_static else DYNAMIC):
                wrong.append(plan.key)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for length in range(50):
        plans.get(key(1000 + length))
        if length % 10 == 0:
            plans.clear()
            plans.get(STATIC)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
