"""What cuDNN's calls remember between them: plans chosen, places computed, handles, scratch memory. (No GPU: fakes.)"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import a_problem
from torch import Tensor

from fastattn._compat import torch as torch_internals
from fastattn.backends import scratch
from fastattn.backends.cudnn import plan_cache as plans
from fastattn.backends.cudnn import runtime
from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.plan_cache import Choice, PlanCache
from fastattn.call import Call
from fastattn.dispatch import routing as dispatch
from fastattn.shape_cache import Memo


def key(length: int) -> PlanKey:
    """Of a call whose log-sum-exp is asked for, with or without gradients: the key does not tell."""
    operands = [Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16)]
    operands.append(Operand("stats", (1, 1, length, 1), (length, length, 1, 1), torch.float32))
    return PlanKey("forward", 0, tuple(operands))


GENERAL, EXACT = key(0), key(100)


# Choice.


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = staticmethod(time.perf_counter)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(plans, "time", found)
    return found


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[PlanKey]:
    """The keys of plans that were built, by a cache of this test's own."""
    found: list[PlanKey] = []

    def build(key: PlanKey) -> SimpleNamespace:
        found.append(key)
        return SimpleNamespace(key=key, store=lambda: None)

    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    monkeypatch.setattr(plans.Plan, "load", staticmethod(lambda key: None))
    monkeypatch.setattr(plans.Plan, "build", staticmethod(build))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plans, "DELAY", 0.0)
    monkeypatch.setattr(plans, "cache", PlanCache(capacity=4))
    return found


@pytest.fixture
def asked(built: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> list[PlanKey | None]:
    """One entry for each time that the cache was asked for the best plan."""
    found: list[PlanKey | None] = []
    best = plans.cache.best
    monkeypatch.setattr(plans.cache, "best", lambda exact, *others: found.append(exact) or best(exact, *others))
    return found


def test_a_choice_asks_the_cache_once(asked: list[Any], clock: Clock) -> None:
    choice = Choice(None, GENERAL)
    plan, is_exact = choice.plan()
    assert plan.key == GENERAL and not is_exact
    choice.plan()  # to build the plan changed the cache
    asked.clear()
    for _ in range(5):
        clock.now += 100
        assert choice.plan() == (plan, False)
    assert asked == [], "without an exact plan to wait for there is nothing to ask"


def test_each_change_of_the_cache_is_noticed(asked: list[Any], clock: Clock) -> None:
    choice = Choice(EXACT, GENERAL, trained=True)
    plans.cache.get(EXACT)
    exact, is_exact = choice.plan()
    assert is_exact and exact.key == EXACT
    asked.clear()
    choice.plan()
    assert asked == []
    plans.cache.get(key(1))  # one comes
    assert choice.plan()[0] is exact and len(asked) == 1
    plans.clear_plans()
    asked.clear()
    plan, is_exact = choice.plan()
    assert asked and not is_exact and plan.key == GENERAL
    assert plan is plans.cache.get(GENERAL)


def test_clear_plans_reaches_every_choice(built: list[PlanKey], clock: Clock) -> None:
    choices = [Choice(None, key(i)) for i in range(3)]
    before = [choice.plan()[0] for choice in choices]
    built.clear()
    plans.clear_plans()
    after = [choice.plan()[0] for choice in choices]
    assert built == [key(i) for i in range(3)]
    assert not any(x is y for x, y in zip(before, after))
    assert [choice.plan()[0] for choice in choices] == after and len(built) == 3


def test_a_change_of_policy_is_noticed(built: list[PlanKey], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(EXACT, GENERAL, trained=True)

    def found() -> tuple[PlanKey, bool]:
        plan, is_exact = choice.plan()
        return plan.key, is_exact

    assert found() == (GENERAL, False)
    monkeypatch.setenv("FASTATTN_PLANS", "exact")
    assert found() == (EXACT, True)
    monkeypatch.setenv("FASTATTN_PLANS", "any")
    assert found() == (GENERAL, False)
    monkeypatch.delenv("FASTATTN_PLANS")
    assert found() == (EXACT, True), "it is there now"
    torch.use_deterministic_algorithms(True)
    try:
        assert found() == (GENERAL, False)
        monkeypatch.setenv("FASTATTN_PLANS", "exact")
        assert found() == (EXACT, True)
        monkeypatch.delenv("FASTATTN_PLANS")
    finally:
        torch.use_deterministic_algorithms(False)
    assert found() == (EXACT, True)
    assert built == [GENERAL, EXACT]


def test_while_the_exact_plan_is_missing_its_occasions_are_counted(
    built: list[PlanKey], asked: list[Any], clock: Clock
) -> None:
    """The model's layers within an occasion are one; a Choice that kept still would be taken for a lost interest."""
    choice = Choice(EXACT, GENERAL, trained=True)
    for _ in range(32):
        assert not choice.plan()[1]
    assert len(asked) <= 3, "of 32 layers the cache hears now and then"
    clock.now += 0.9 * plans.OCCASION
    choice.plan()
    assert plans.cache.wait(10) and built == [GENERAL]
    clock.now += 0.4 * plans.OCCASION
    for _ in range(32):
        choice.plan()
    assert plans.cache.wait(10) and built == [GENERAL, EXACT]
    plan, is_exact = choice.plan()
    assert is_exact and plan.key == EXACT


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_trained_is_told_by_the_call_not_by_its_log_sum_exp(
    trained: bool, built: list[PlanKey], clock: Clock
) -> None:
    """Sinks and return_lse ask for it as well: a stall for text that is being generated."""
    choice = Choice(EXACT, GENERAL, trained=trained)
    enough = plans.EXACT_AFTER if trained else plans.SERVED_AFTER
    assert plans.SERVED_AFTER >= 8 * plans.EXACT_AFTER
    for occasion in range(1, enough + 1):
        assert built in ([], [GENERAL]), occasion
        choice.plan()
        clock.now += 2 * plans.OCCASION
        assert plans.cache.wait(10)
    assert built == [GENERAL, EXACT]


def test_training_counts_what_was_served_before(built: list[PlanKey], clock: Clock) -> None:
    """The same plan serves both; it is built once."""
    served, trained = Choice(EXACT, GENERAL), Choice(EXACT, GENERAL, trained=True)
    both = [GENERAL, EXACT]
    for choice, expected in (*[(served, [GENERAL])] * 5, *[(trained, both), (served, both)] * 20):
        choice.plan()
        clock.now += 2 * plans.OCCASION
        assert plans.cache.wait(10)
        assert built == expected


@pytest.mark.parametrize("features, grads", [("", "qkv"), ("lse", ""), ("sinks", ""), ("sinks", "qkvs"), ("", "")])
def test_the_calls_of_cudnn_say_whether_they_train(features: str, grads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.cudnn import forward

    found: list[bool] = []
    monkeypatch.setattr(forward, "Choice", lambda *keys, trained: found.append(trained))
    p = dataclasses.replace(PROBLEM, sinks=features == "sinks", return_lse=features == "lse", grads=grads)
    q, k = torch.zeros(1, 4, 5, 8, dtype=torch.float16), torch.zeros(1, 2, 5, 8, dtype=torch.float16)
    forward._WithoutBias(p, q, k, k)
    assert found == [bool(grads)]


@pytest.mark.parametrize("value", ["exakt", "2", "0", "exact,any", " "])
def test_a_policy_that_there_is_not_is_refused_by_name(
    value: str, built: list[PlanKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.backends.cudnn import CudnnBackend

    monkeypatch.setenv("FASTATTN_PLANS", value)
    expected = rf"FASTATTN_PLANS: expected one of auto, exact, any, got '{value}'"
    for mask in ("none", "bool"):  # of which the second takes an exact plan whatever the policy is
        with pytest.raises(ValueError, match=expected):
            CudnnBackend().bind(dataclasses.replace(PROBLEM, mask=mask), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected):
        Choice(EXACT, GENERAL).plan()
    for good in ("EXACT", " any ", "auto", ""):
        monkeypatch.setenv("FASTATTN_PLANS", good)
        assert plans.policy() == (good.strip().lower() or "auto")


def test_steady_calls_reach_the_second_occasion_in_time(built: list[PlanKey], clock: Clock) -> None:
    choice = Choice(EXACT, GENERAL, trained=True)
    start = clock.now
    while not choice.plan()[1]:
        clock.now += 0.01
        assert plans.cache.wait(10)
        assert clock.now - start < 1.5 * plans.EXACT_AFTER * plans.OCCASION
    assert clock.now - start >= plans.OCCASION


def test_the_exact_plan_is_taken_as_soon_as_it_is_there(
    built: list[PlanKey], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, build = threading.Event(), plans.Plan.build

    def slow(key: PlanKey) -> Any:
        if key == EXACT:
            assert finish.wait(10)
        return build(key)

    monkeypatch.setattr(plans.Plan, "build", staticmethod(slow))
    choice = Choice(EXACT, GENERAL, trained=True)
    choice.plan()
    clock.now += 2 * plans.OCCASION
    for _ in range(3):
        assert choice.plan()[0].key == GENERAL, "nobody waits for it"
    finish.set()
    assert plans.cache.wait(10)
    assert choice.plan() == (plans.cache.get(EXACT), True), "at the next call, though the clock stands still"


def test_a_plan_in_use_is_not_evicted_before_the_others(built: list[PlanKey], clock: Clock) -> None:
    """A Choice does not go through the cache at each call; the order of use must not suffer."""
    plans.cache.get(EXACT)
    hot, warm = Choice(EXACT, GENERAL, trained=True), Choice(None, key(1))
    plan = hot.plan()[0]
    for length in range(200, 230):
        for _ in range(3):
            assert hot.plan() == (plan, True)
        warm.plan()
        plans.cache.get(key(length))
    assert built.count(EXACT) == 1 and built.count(key(1)) == 1
    assert plans.cache.stats()["plans"] == plans.cache.capacity
    assert plans.cache.stats()["evictions"] == 32 - plans.cache.capacity
    assert hot.plan()[0] is plans.cache.get(EXACT)


def test_a_plan_that_was_evicted_is_not_kept_alive_and_comes_back(built: list[PlanKey], clock: Clock) -> None:
    plans.cache.get(EXACT)
    choice = Choice(EXACT, GENERAL, trained=True)
    assert choice.plan()[1]
    for length in range(200, 210):
        plans.cache.get(key(length))
    assert choice.plan()[0].key == GENERAL, "the exact one is gone, the general one was built"
    clock.now += 2 * plans.OCCASION
    choice.plan()
    assert plans.cache.wait(10)
    assert choice.plan()[1]


def test_an_exact_plan_that_was_built_for_coming_back_and_evicted_comes_back_again(
    built: list[PlanKey], clock: Clock
) -> None:
    """It has been asked for often enough before, and that must not count as having been refused."""
    choice = Choice(EXACT, GENERAL, trained=True)
    for round in (1, 2):
        for _ in range(2 * plans.EXACT_AFTER):
            choice.plan()
            clock.now += 2 * plans.OCCASION
            assert plans.cache.wait(10)
        assert choice.plan()[1], round
        assert built.count(EXACT) == round
        for length in range(200, 210):
            plans.cache.get(key(length))


LARGER = key(1 << 11), key(1 << 12)


def test_a_larger_plan_serves_until_the_general_one_is_there(
    built: list[PlanKey], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "DELAY", 0.4)
    plans.cache.get(LARGER[1])
    choice = Choice(None, GENERAL, lambda: LARGER)
    for _ in range(3):
        plan, is_exact = choice.plan()
        assert plan.key == LARGER[1] and not is_exact
    assert built == [LARGER[1]], "nobody waits"
    assert plans.cache.wait(10) and built == [LARGER[1], GENERAL]
    assert choice.plan() == (plans.cache.get(GENERAL), False), "at the next call"


def test_without_any_plan_the_general_one_is_built_and_the_next_larger_one_prepared(
    built: list[PlanKey], clock: Clock
) -> None:
    choice = Choice(EXACT, GENERAL, lambda: LARGER, trained=True)
    assert choice.plan()[0].key == GENERAL
    assert plans.cache.wait(10) and built == [GENERAL, LARGER[0]]
    assert choice.plan()[0].key == GENERAL, "the larger one is another length's"
    plans.clear_plans()
    assert choice.plan()[0].key == GENERAL
    assert plans.cache.wait(10) and built == [GENERAL, LARGER[0]] * 2


def test_while_capturing_nothing_larger_is_prepared(
    built: list[PlanKey], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert Choice(EXACT, GENERAL, lambda: LARGER, trained=True).plan()[0].key == GENERAL
    assert plans.cache.wait(10) and built == [GENERAL]


def test_a_general_plan_that_was_evicted_is_prepared_again(built: list[PlanKey], clock: Clock) -> None:
    """While a larger one, at a cost, serves in its place."""
    choice = Choice(None, GENERAL, lambda: LARGER)
    plans.cache.get(LARGER[0])
    for round in (1, 2):
        for _ in range(2):
            choice.plan()
            assert plans.cache.wait(10)
        assert choice.plan()[0].key == GENERAL, round
        assert built.count(GENERAL) == round
        for length in range(200, 210):
            plans.cache.get(LARGER[0])
            plans.cache.get(key(length))


def test_a_choice_is_every_threads(built: list[PlanKey]) -> None:
    """Plans come and go and the policy stays: whatever the order, the plan is the one of a key of this choice."""
    choice = Choice(EXACT, GENERAL, trained=True)
    stop, wrong = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            plan, is_exact = choice.plan()
            if plan.key != (EXACT if is_exact else GENERAL):
                wrong.append(plan.key)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for length in range(50):
        plans.cache.get(key(1000 + length))
        if length % 10 == 0:
            plans.clear_plans()
            plans.cache.get(EXACT)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# Places.


class Streams:
    """torch's current stream, and whether it captures."""

    def __init__(self) -> None:
        self.current = 7
        self.capturing = False


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch_internals, "raw_stream", lambda index: found.current + 100 * index)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(scratch, "_local", type(scratch._local)())
    return found


PROBLEM = a_problem(dtype=torch.float16, q_heads=4, kv_heads=2, q_len=5, kv_len=5, head_dim=8, value_dim=8)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> Callable[..., tuple[Callable[[], Any], list[Any]]]:
    """ask(changes of PROBLEM) -> a call of its Places, and the calls that were computed."""
    pytest.importorskip("triton")
    from fastattn.backends.cudnn import ragged_offsets as module

    def make(**changes: Any) -> tuple[Callable[[], Any], list[Any]]:
        computed: list[Any] = []
        monkeypatch.setattr(module, "places", lambda *args: computed.append(args) or {"seq_q": torch.empty(1)})
        places = module.Places(dataclasses.replace(PROBLEM, **changes), 8, 2)
        fake = SimpleNamespace(device=SimpleNamespace(index=0))
        call = Call(fake, fake, fake)  # type: ignore[arg-type]
        return lambda: places({}, call), computed

    return make


def test_places_are_made_once_for_each_stream(ask: Any, streams: Streams) -> None:
    places, computed = ask()
    first = places()
    assert places() is first and len(computed) == 1
    streams.current = 8
    second = places()
    assert second is not first and places() is second and len(computed) == 2
    streams.current = 7
    assert places() is first and len(computed) == 2


def test_places_of_many_streams_are_bounded(ask: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.cudnn import ragged_offsets as module

    one = torch.empty(1).untyped_storage().nbytes()
    for entries, most_bytes, reached in ((8, 100 * one, 8), (100, 5 * one, 5)):
        kept = Memo(entries, "offsets", module._bytes, most_bytes)
        monkeypatch.setattr(module, "_kept", kept)
        calls, most = [ask()[0] for _ in range(3)], 0
        for stream in range(20):
            streams.current = stream
            for places in calls:
                assert places() is places()
                assert kept.holds() == (len(kept), len(kept) * one)
                most = max(most, len(kept))
        assert most == reached
    assert module._kept.limit <= 1 << 14 and module.MOST_BYTES <= 64 << 20


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lengths": True},
        {"kv_lengths": True},
        {"mask": "intervals", "mask_shape": (1, 1), "mask_dtype": torch.int32},
        {"mask": "segments", "mask_shape": (3, 4), "mask_dtype": torch.int32},
    ],
    ids=str,
)
def test_places_that_are_data_are_not_kept(changes: dict[str, Any], ask: Any) -> None:
    places, computed = ask(**changes)
    assert places() is not places()
    assert len(computed) == 2


def test_places_made_while_capturing_are_the_graphs(ask: Any, streams: Streams) -> None:
    places, computed = ask()
    streams.capturing = True
    graph = places()
    assert places() is not graph and len(computed) == 2
    streams.capturing = False
    kept = places()
    assert kept is not graph
    streams.capturing = True
    assert places() is not kept, "a graph replays on any stream, and outlives what is kept"
    streams.capturing = False
    assert places() is kept


def test_places_made_inside_an_operator_are_not_kept(ask: Any) -> None:
    """torch.compile warms up a graph's memory there, and frees it all at once."""
    places, computed = ask()
    token = dispatch.opaque.set(True)
    try:
        inside = places()
        assert places() is not inside
    finally:
        dispatch.opaque.reset(token)
    assert places() is not inside and len(computed) == 3
    assert places() is places()


def test_operators_say_that_they_are_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and the backward, and no longer."""
    from fastattn import api
    from fastattn.dispatch import operators as ops

    seen: list[bool] = []
    serve, gradients = ops.serve, ops._gradients
    monkeypatch.setattr(ops, "serve", lambda *args: seen.append(dispatch.opaque.get()) or serve(*args))
    monkeypatch.setattr(ops, "_gradients", lambda *args: seen.append(dispatch.opaque.get()) or gradients(*args))
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    out, _ = torch.ops.fastattn.attention(*api.prepare(q, q, q), "reference")
    out.sum().backward()
    assert seen == [True, True]
    api.scaled_dot_product_attention(q, q, q).sum().backward()
    assert seen == [True, True, False, False]
    with pytest.raises(ValueError, match="no allowed backend"):
        torch.ops.fastattn.attention(*api.prepare(q, q, q, softcap=1.0), "torch")
    assert not dispatch.opaque.get()


# Scratch.


@pytest.fixture
def allocated(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were allocated. Devices are `gpu(0)` and so on; their memory is the CPU's."""
    found: list[int] = []

    def empty(size: int, dtype: torch.dtype, device: Any) -> Tensor:
        found.append(size)
        return torch.empty(size, dtype=dtype)

    fake = SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=torch.cuda)
    monkeypatch.setattr(scratch, "torch", fake)
    return found


def gpu(index: int = 0) -> Any:
    return SimpleNamespace(type="cuda", index=index)


def test_scratch_is_used_again_on_its_stream(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 1000)
    assert first.dtype == torch.uint8 and first.dim() == 1
    for size in (0, 1, 1000, 65536):
        assert scratch.scratch(gpu(), size) is first
    assert allocated == [65536]


def test_scratch_grows(allocated: list[int], streams: Streams) -> None:
    for size in (1, 65536, 65537, 100_000, 131_072, 131_073, 5, 1 << 22):
        assert scratch.scratch(gpu(), size).shape[0] >= size
    assert allocated == [65536, 131_072, 262_144, 1 << 22]


def test_scratch_is_one_streams(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 10)
    streams.current = 8
    second = scratch.scratch(gpu(), 10)
    assert second.data_ptr() != first.data_ptr()
    assert scratch.scratch(gpu(), 10) is second
    streams.current = 7
    assert scratch.scratch(gpu(), 10).data_ptr() != second.data_ptr()


def test_scratch_is_one_devices(allocated: list[int], streams: Streams) -> None:
    first, second = scratch.scratch(gpu(0), 10), scratch.scratch(gpu(1), 10)
    assert first is not second
    assert scratch.scratch(gpu(0), 10) is first and scratch.scratch(gpu(1), 10) is second


def test_scratch_is_one_threads(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 10)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(scratch.scratch(gpu(), 10)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != first.data_ptr()
    assert scratch.scratch(gpu(), 10) is first


@pytest.mark.parametrize("why", ["capturing", "inside an operator", "large", "on the CPU"])
def test_scratch_that_is_not_kept(why: str, allocated: list[int], streams: Streams) -> None:
    kept = scratch.scratch(gpu(), 10)
    size = scratch._KEPT + 1 if why == "large" else 10
    device = torch.device("cpu") if why == "on the CPU" else gpu()
    streams.capturing = why == "capturing"
    token = dispatch.opaque.set(why == "inside an operator")
    try:
        found = [scratch.scratch(device, size) for _ in range(2)]
    finally:
        dispatch.opaque.reset(token)
    streams.capturing = False
    assert len({x.data_ptr() for x in (kept, *found)}) == 3
    assert all(x.shape == (size,) for x in found)
    assert scratch.scratch(gpu(), 10) is kept


# Handles.


class Library:
    """cuDNN's handles: which were made, which stream each is bound to."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.bound: list[tuple[int, int]] = []

    def create_handle(self) -> int:
        self.made.append(len(self.made))
        return self.made[-1]

    def set_stream(self, handle: int, stream: int) -> None:
        self.bound.append((handle, stream))


@pytest.fixture
def library(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(runtime, "frontend", lambda: runtime.Frontend(found, 91900, ""))
    monkeypatch.setattr(runtime, "_handles", defaultdict(list))
    monkeypatch.setattr(runtime, "_local", type(runtime._local)())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return found


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    gc.collect()
    return found[0]


def handle() -> int:
    return runtime.context(0).handle


def test_a_thread_keeps_its_context(library: Library) -> None:
    first = runtime.context(0)
    assert runtime.context(0) is first
    assert library.made == [0] and library.bound == [(0, 7)]


def test_a_handle_follows_the_stream(library: Library, streams: Streams) -> None:
    for stream in (7, 8, 8, 7, 0, 0):
        streams.current = stream
        runtime.context(0)
    assert library.bound == [(0, 7), (0, 8), (0, 7), (0, 0)]


def test_each_thread_and_device_has_its_own(library: Library) -> None:
    mine, other = runtime.context(0), runtime.context(1)
    assert mine.handle != other.handle and mine.address != other.address
    barrier = threading.Barrier(4)
    found: list[tuple[int, int]] = []

    def use() -> None:
        context = runtime.context(0)
        found.append((context.handle, context.address))
        barrier.wait(10)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({h for h, _ in found} | {mine.handle}) == 5 and len({a for _, a in found} | {mine.address}) == 5
    assert runtime.context(0) is mine


def test_a_handle_is_handed_on_when_its_thread_ends(library: Library, streams: Streams) -> None:
    """Threads come and go (a data loader's, a server's): handles are not to pile up, and their streams are not kept."""
    mine = handle()
    for stream in range(20, 30):
        streams.current = stream
        assert in_thread(handle) == 1
        assert library.bound[-1] == (1, stream)
    streams.current = 29
    in_thread(handle)
    assert library.bound[-2:] == [(1, 29), (1, 29)], "the new owner binds it, whatever it was bound to"
    assert library.made == [0, 1] and handle() == mine


def test_a_handle_is_handed_on_within_its_device(library: Library) -> None:
    first = in_thread(lambda: runtime.context(0).handle)
    second = in_thread(lambda: runtime.context(1).handle)
    assert first != second
    assert in_thread(lambda: runtime.context(1).handle) == second
    assert in_thread(lambda: runtime.context(0).handle) == first


def test_no_handle_no_context(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be made is not handed on."""

    def refuse() -> int:
        raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(library, "create_handle", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
            runtime.context(0)
    gc.collect()
    assert not runtime._handles[0] and not runtime._local.__dict__


def test_a_context_that_ends_after_its_module(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    context = runtime.Context(0)
    monkeypatch.setattr(runtime, "_handles", None)
    context.__del__()
