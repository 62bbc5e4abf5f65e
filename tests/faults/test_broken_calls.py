"""Calls that end in the middle, by Ctrl-C or for want of memory: no lock stays held, and later calls are right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import own_caches
from cases import BF16, FP32, Case, make
from cases import run as run_case
from injected import broken, each_point, may_interrupt, may_run_out, out_of_memory, points
from pretended_gpu import pretend
from torch import Tensor

import fastattn
from fastattn import KVCache
from fastattn.backends import scratch
from fastattn.backends.base import Refusal
from fastattn.backends.cudnn import plans
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.backends.cudnn.plan_cache import PlanCache
from fastattn.backends.cudnn.plans import Plans
from fastattn.common import notice
from fastattn.dispatch import fast_path, registry, routes, serve

MOST = 150  #: points tried of one call
ERRORS = {"interrupt": (may_interrupt, KeyboardInterrupt), "memory": (may_run_out, out_of_memory)}

_BASE = Case(dtype=FP32, q_len=9, kv_len=9, mask="causal")
_ALL = _BASE.but(mask="additive:b1qk", kv_lengths=(9, 4), window=(3, 1), sinks=FP32, softcap=3.0, return_lse=True)
CALLS: dict[str, tuple[str | None, Case]] = {
    "torch": ("torch", _BASE),
    "torch, mask": ("torch", _BASE.but(mask="bool:b1qk", kv_lengths=(9, 2))),
    "torch, gradients": ("torch", _BASE.but(mask="bool:b1qk", grads="qkv")),
    "reference": ("reference", _ALL),
    "reference, gradients": ("reference", _ALL.but(grads="qkvms")),
    "segments": (None, _BASE.but(mask="segments:3c", dtype=BF16)),
    "decode": ("decode", _BASE.but(q_len=2, kv_len=40, kv_lengths=(40, 3), sinks=FP32)),
}


def locks_are_free() -> None:
    worker = plans.shared._worker._state
    with ThreadPoolExecutor(1) as other:  # a lock that may be taken twice has to be tried from another thread
        for lock in (serve._lock, notice._lock, plans.shared.cache._lock, worker):
            assert other.submit(lock.acquire, timeout=5).result()
            other.submit(lock.release).result()
    assert registry._chosen.get() is None and not scratch._inside_operator.get()
    assert torch.is_grad_enabled()


def forget() -> None:
    routes._routes.clear()
    fast_path._cached.clear()


@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ERRORS)
def test_broken_calls(kind: str, name: str, remembered: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a call breaks off, the next one gives what it gave before, bit by bit."""
    backend, case = CALLS[name]
    if backend == "decode":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton runs natively here")
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    counts, error = ERRORS[kind]
    inputs = make(case, seed=seed)

    def call() -> dict[str, Tensor]:
        return run_case(inputs, backend, poison=False)

    want = call()
    total = points(call, counts) if remembered else 0
    if not remembered:
        forget()
        total = points(call, counts)
    assert total >= 3, "nothing to break"
    stopped = 0
    most = 12 if backend == "decode" else MOST  # the interpreter takes its time
    for at in each_point(total, most):
        if not remembered:
            forget()
        stopped += broken(call, counts, at, error())
        locks_are_free()
        got = call()
        assert all(torch.equal(got[key], x) for key, x in want.items()), f"after an error at place {at} of {total}"
    assert stopped >= min(total, most) // 3, "most errors come out as they are"


class CountingPlans(Plans):
    """Real plans: what is pretended is that cuDNN builds them."""

    def __init__(self) -> None:
        self.built: set[PlanKey] = set()
        super().__init__(load=lambda key: None, build=self.build, delay=0.0)

    def build(self, key: PlanKey) -> Any:
        self.built.add(key)
        return SimpleNamespace(key=key, execute=lambda operands: None, store=lambda: None)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountingPlans:
    """An H100 that is not there, with real plans."""
    pretend(monkeypatch)
    found = CountingPlans()
    monkeypatch.setattr(plans, "shared", found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("mask", ["causal", "bool:b1qk", "segments:3c"])
def test_broken_calls_of_cudnn(kind: str, mask: str, counted: CountingPlans, seed: int) -> None:
    """Binding, choosing and building a plan."""
    counts, error = ERRORS[kind]
    inputs = make(_BASE.but(dtype=BF16, mask=mask, head_dim=16, q_heads=8, q_len=64, kv_len=64, grads="qkv"), seed=seed)

    def call() -> dict[str, Tensor]:
        return run_case(inputs, "cudnn", poison=False)

    def anew() -> None:
        forget()
        counted.clear()
        counted.built = set()

    call()
    assert counted.wait(10)
    want = counted.built
    assert {key.direction for key in want} == {"forward", "backward"}
    anew()
    total = points(call, counts)
    for at in each_point(total, MOST):
        anew()
        broken(call, counts, at, error())
        locks_are_free()
        call()
        counted._worker.submit(lambda: None)  # see test_worker_faults: an interrupted submit is not heard
        assert counted.wait(10)
        turns = counted.cache._building  # one that stays behind, free, is used again
        assert turns.keys() <= want and not any(lock.locked() for lock in turns.values())
        # The interrupt may have come between the decision that a larger plan is wanted and the worker's hearing of it.
        missing = want - counted.built
        assert not missing or (kind == "interrupt" and len(missing) == 1 and len(want) == 3), at


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("windows", [None, 3])
def test_a_broken_step_of_a_cache(kind: str, windows: int | None, seed: int) -> None:
    """What a cache holds after a step that broke off is not said. A reset brings it back."""
    counts, error = ERRORS[kind]
    cache = KVCache(layers=1, batch=2, kv_heads=1, head_dim=8, capacity=8, windows=windows, dtype=FP32, device="cpu")
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 1, 3, 8)

    def steps() -> list[Tensor]:
        cache.reset()
        found = []
        for tokens in (3, 1):
            cache.step(tokens)
            found.append(cache.attend(0, q[:, :, :tokens], k[:, :, :tokens], k[:, :, :tokens]))
        return found

    want = steps()
    for at in each_point(points(steps, counts), MOST):
        broken(steps, counts, at, error())
        locks_are_free()
        assert all(torch.equal(x, y) for x, y in zip(steps(), want)), at


def test_a_plan_that_found_no_memory_is_built_the_next_time() -> None:
    failures = [out_of_memory(), KeyboardInterrupt(), out_of_memory()]

    def build(key: PlanKey) -> Any:
        if failures:
            raise failures.pop()
        return SimpleNamespace(key=key, store=lambda: None)

    cache = PlanCache(load=lambda key: None, build=build)
    key = PlanKey("forward", 0, ())
    for expected in (torch.OutOfMemoryError, KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(expected):
            cache.get(key)
        assert not cache._building and not cache._lock.locked()
    assert cache.get(key).key == key
    assert cache.stats()["builds"] == 1


def test_a_refusal_when_called_is_remembered_and_nothing_is_computed_twice(seed: int) -> None:
    """A backend that breaks its word in its third call: another one serves that call and all later ones."""
    inputs = make(_BASE, seed=seed)
    want = run_case(inputs, "reference")["out"]
    with pytest.MonkeyPatch.context() as patch:
        own_caches(patch)
        patch.setattr(notice, "_given", set())
        forget()
        calls = []
        torch_backend = registry.backend("torch")
        bind = torch_backend.bind

        def refusing(problem: Any, call: Any) -> Any:
            kernel = bind(problem, call)

            def forward(call: Any) -> Any:
                calls.append(call)
                if len(calls) > 2:
                    raise Refusal("no more")
                return kernel.forward(call)

            return SimpleNamespace(forward=forward)

        patch.setattr(torch_backend, "bind", refusing)
        with pytest.warns(fastattn.FastattnWarning, match="torch refused a call.*no more") as warned:
            for _ in range(6):
                out = fastattn.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask="causal")
                torch.testing.assert_close(out, want)
        assert len(calls) == 3 and len(warned) == 1
        with pytest.raises(fastattn.BackendError, match="no more"):
            fastattn.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask="causal", backend="torch")
    forget()


@pytest.mark.gpu
def test_memory_that_runs_out_on_a_gpu(seed: int) -> None:
    """A real one: with a limit that the output fits into and the rest does not, and without it afterwards."""
    case = Case(batch=1, q_heads=8, kv_heads=2, q_len=8192, kv_len=8192, head_dim=128, dtype=BF16, mask="causal")
    total = torch.cuda.get_device_properties(0).total_memory

    def calls_without_end() -> list[Any]:
        return [run_case(inputs, backend, poison=False) for _ in range(64)]  # what the allocator has at hand goes first

    for backend, grads in (("cudnn", "qkv"), ("torch", "qkv"), ("reference", ""), ("cudnn", "")):
        torch.cuda.empty_cache()  # else the inputs may be pieces of a large segment, whose rest is no part of the limit
        inputs = make(case.but(grads=grads), "cuda", seed)
        want = run_case(inputs, backend, poison=False)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        try:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
            with pytest.raises(torch.OutOfMemoryError):
                calls_without_end()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        locks_are_free()
        for name, x in run_case(inputs, backend, poison=False).items():
            torch.testing.assert_close(x, want[name], rtol=2e-2, atol=2e-2)
