"""What stands in a backend's way for a while (memory that ran out, a library that does not start) is no refusal."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, Case, assert_right, make, reference_results
from cases import run as run_case
from cudnn_library import use_library
from torch import Tensor

import fastattn
from fastattn.backends import errors as failures
from fastattn.backends import reference
from fastattn.backends import torch as torch_sdpa
from fastattn.backends.base import OutOfMemory, Refusal, Setback
from fastattn.backends.cudnn import plan as plan_module
from fastattn.backends.cudnn import plan_policy, runtime
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.backends.cudnn.plan import Plan, PlanError
from fastattn.backends.cudnn.plan_policy import State
from fastattn.backends.cudnn.plans import Plans
from fastattn.dispatch import refusals, registry, routes, serve

CASE = Case(dtype=torch.float32, q_len=9, kv_len=9, mask="causal")
CPU = torch.device("cpu")
#: What libraries say when memory ran out, as heard or as in their headers.
MEMORY = [
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[cudnn_frontend] Error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "Triton Error [CUDA]: out of memory",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation: failed",
]


pytestmark = pytest.mark.usefixtures("fresh_caches", "fresh_warnings")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (refusals, routes, serve):
        monkeypatch.setattr(module, "time", found)
    return found


class Moody:
    """torch's backend, raising what it is told to, forward and backward; it reads the log-sum-exp if it is to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.asked = 0
        bind = torch_sdpa.TorchBackend.bind

        def moody(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                self.asked += 1
                if self.error is not None:
                    raise self.error
                return function(*arguments)

            return call

        def bound(*arguments: Any) -> Any:
            kernel = bind(*arguments)
            return SimpleNamespace(forward=moody(kernel.forward), backward=moody(kernel.backward))

        monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", bound)


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Moody:
    return Moody(monkeypatch)


def served(inputs: Any, backend: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """A call, which has to be right, and who served it."""
    before = fastattn.stats()["calls"]
    results = run_case(inputs, backend, poison=False)
    after = fastattn.stats()["calls"]
    return results, [name for name in after if after[name] != before.get(name, 0)]


# What an error means.


@pytest.mark.parametrize("text", MEMORY)
def test_memory_that_ran_out_is_recognised(text: str) -> None:
    assert type(failures.failure_of(RuntimeError(text), CPU)) is OutOfMemory
    assert isinstance(failures.setback_of(RuntimeError(text), 0, unsupported=True), OutOfMemory)
    assert failures.says_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("out of memory"), KeyError("x"),
        RuntimeError("CUDA error: an illegal memory access was encountered"), AssertionError(),
        RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), RuntimeError("expected memory format"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_the_callers(error: Exception) -> None:
    """torch's own error too: its allocator has given back what there was, and the caller may ask for less."""
    assert failures.failure_of(error, CPU) is None


def test_a_kernel_that_does_not_fit_the_gpu_is_refused_for_good() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    found = failures.failure_of(errors.OutOfResources(300_000, 232_448, "shared memory"), CPU)
    assert type(found) is Refusal and "shared memory" in str(found)


def test_a_library_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for short, kind in ((False, Setback), (True, OutOfMemory)):
        monkeypatch.setattr(failures, "memory_is_short", lambda index, short=short: short)
        assert type(failures.failure_of(error, gpu)) is kind
        assert type(failures.failure_of(error, CPU)) is Setback


def test_not_supported_is_not_believed_while_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN has no plan to offer where it had no memory to make one."""
    error = RuntimeError("No valid execution plans")
    for free, expected in ((10 << 20, OutOfMemory), (10 << 30, type(None))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index, free=free: (free, 80 << 30))
        assert type(failures.setback_of(error, 0, unsupported=True)) is expected
    assert type(failures.setback_of(error, 0, unsupported=False)) is Setback


# What comes of a call.


@pytest.mark.parametrize("grads", ["", "qkv"])
@pytest.mark.parametrize("text", MEMORY[:4])
def test_another_backend_serves_and_the_first_one_later(
    text: str, grads: str, moody: Moody, clock: Clock, seed: int
) -> None:
    case = CASE.but(grads=grads)
    inputs = make(case, seed=seed)
    want = reference_results(inputs)
    for _ in range(2):
        assert_right(case, inputs, served(inputs)[0], want)
    moody.error = RuntimeError(text)
    with pytest.warns(fastattn.FastattnWarning, match="torch could not serve a call .*tried again") as warned:
        results, names = served(inputs)
        assert_right(case, inputs, results, want)
        assert {name.split(".")[0] for name in names} == {"reference"}
        asked = moody.asked
        for _ in range(3):  # not asked at each call: each try has its price
            assert_right(case, inputs, served(inputs)[0], want)
        assert moody.asked == asked
    assert len(warned) == 1
    moody.error = None
    clock.now += 2 * refusals.FIRST_WAIT
    for _ in range(2):
        results, names = served(inputs)
        assert_right(case, inputs, results, want)
        assert {name.split(".")[0] for name in names} == {"torch"}, "as before"
    assert fastattn.explain(inputs.q, inputs.k, inputs.v, mask="causal").chosen == "torch"


def test_alone_it_is_out_of_memory_and_tried_each_time(moody: Moody, clock: Clock, seed: int) -> None:
    """Never "no allowed backend": the next call may go well."""
    inputs = make(CASE, seed=seed)
    want = reference_results(inputs)
    moody.error = RuntimeError(MEMORY[0])
    for turn in (1, 2, 3):
        with pytest.raises(torch.OutOfMemoryError, match="CUDNN_STATUS_ALLOC_FAILED"):
            run_case(inputs, "torch", poison=False)
        assert moody.asked == turn
    moody.error = None
    assert_right(CASE, inputs, served(inputs, "torch")[0], want)
    moody.error = RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")
    with pytest.raises(fastattn.BackendError, match="torch: CUDNN_STATUS_NOT_INITIALIZED"):
        run_case(inputs, "torch", poison=False)
    moody.error = None
    assert_right(CASE, inputs, served(inputs, "torch")[0], want)


def test_memory_first_and_a_refusal_after_it(moody: Moody, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left, and memory was in the way of one: that is what the caller hears."""
    inputs = make(CASE, seed=seed)
    moody.error = RuntimeError(MEMORY[1])

    def refuse(*arguments: Any) -> Any:
        raise Refusal("never")

    monkeypatch.setattr(reference.ReferenceBackend, "bind", lambda *arguments: SimpleNamespace(forward=refuse))
    with fastattn.use_backend("torch", "reference"), pytest.raises(torch.OutOfMemoryError):
        run_case(inputs, poison=False)


def test_each_failure_at_once_doubles_the_wait(moody: Moody, clock: Clock, seed: int) -> None:
    inputs = make(CASE, seed=seed)
    moody.error, wait = RuntimeError(MEMORY[0]), refusals.FIRST_WAIT
    for _ in range(12):
        asked = moody.asked
        run_case(inputs, poison=False)
        assert moody.asked == asked + 1
        clock.now += 0.9 * wait
        run_case(inputs, poison=False)
        assert moody.asked == asked + 1
        clock.now += 0.2 * wait
        wait = min(2 * wait, refusals.LONGEST_WAIT)
    assert wait == refusals.LONGEST_WAIT
    moody.error = None
    run_case(inputs, poison=False)
    clock.now += 10 * refusals.LONGEST_WAIT
    moody.error = RuntimeError(MEMORY[0])
    run_case(inputs, poison=False)
    clock.now += 1.1 * refusals.FIRST_WAIT
    asked = moody.asked
    run_case(inputs, poison=False)
    assert moody.asked == asked + 1, "what went well in between begins anew"


def test_torchs_unused_memory_is_given_back_first(moody: Moody, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(CASE, seed=seed)
    given: list[Any] = []

    def give_back(device: torch.device) -> bool:
        given.append(device)
        moody.error = None
        return True

    monkeypatch.setattr(serve, "give_back", give_back)
    for turn in (1, 2):  # the second time by the fast path
        moody.error = RuntimeError(MEMORY[2])
        assert served(inputs)[1] == ["torch"]
        assert len(given) == turn
    assert not refusals._refusals


@pytest.mark.parametrize("names", [("torch", "reference"), ("torch",)])
def test_while_a_backend_is_passed_over_calls_are_bound_once(
    names: tuple[str, ...], moody: Moody, clock: Clock, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bind a kernel takes as long as many a call, and what a kernel caches would be made anew for each."""
    bound: list[str] = []
    for backend in (torch_sdpa.TorchBackend, reference.ReferenceBackend):

        def bind(self: Any, *arguments: Any, bind: Any = backend.bind) -> Any:
            bound.append(self.name)
            return bind(self, *arguments)

        monkeypatch.setattr(backend, "bind", bind)
    inputs = make(CASE, seed=seed)
    want = reference_results(inputs)
    moody.error = RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")
    with fastattn.use_backend(*names):
        with contextlib.suppress(fastattn.BackendError):
            run_case(inputs, poison=False)
        moody.error = None
        bound.clear()
        for _ in range(3):
            assert_right(CASE, inputs, served(inputs)[0], want)
        assert len(bound) <= 1
        bound.clear()
        clock.now += 2 * refusals.FIRST_WAIT
        for _ in range(3):
            assert served(inputs)[1] == ["torch"]
        assert bound == ["torch"]


def fails(kind: type[Exception], *arguments: Any) -> Any:
    """Raises a new exception: one that a test holds would hold the frames that it went through."""
    raise kind("out of luck")


@pytest.mark.parametrize("pass_", ["forward", "cached forward", "backward"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, ValueError, Refusal, Setback, OutOfMemory])
def test_what_failed_keeps_no_tensor_alive(
    kind: type[Exception], pass_: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who catches the error tries a smaller batch: the memory of the larger one has to be free by then, and
    not when the garbage collector runs next."""
    attend, kernel = fastattn.scaled_dot_product_attention, torch_sdpa._TorchKernel

    def use() -> list[weakref.ref[Tensor]]:
        tensors = [torch.randn(1, 2, 5, 8).requires_grad_(pass_ == "backward") for _ in range(3)]
        if pass_ == "cached forward":
            attend(*tensors)  # type: ignore[arg-type]
        with monkeypatch.context() as patch, contextlib.suppress(torch.OutOfMemoryError, ValueError):
            patch.setattr(kernel, pass_.split()[-1], lambda self, *arguments: fails(kind, *arguments))
            out = attend(*tensors)  # type: ignore[arg-type]
            tensors.append(out)  # type: ignore[arg-type]
            if pass_ == "backward":
                out.sum().backward()  # type: ignore[union-attr]
        return [weakref.ref(x) for x in tensors]

    gc.collect()
    gc.disable()
    try:
        assert [x() is None for x in use()].count(False) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("entry", ["eager", "operator"])
@pytest.mark.parametrize("forgotten", ["waited", "cleared"])
def test_the_backend_that_is_back_by_the_backward_reads_no_log_sum_exp_that_is_not_there(
    entry: str, forgotten: str, moody: Moody, clock: Clock, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of a call is torch's, which gives none, in place of one whose backward reads it."""
    case = CASE.but(grads="qkv")
    inputs = make(case, seed=seed)
    want = reference_results(inputs)
    told: list[Tensor] = []

    def forward(call: Any) -> Any:
        raise RuntimeError(MEMORY[0])

    def bind(problem: Any, call: Any) -> Any:
        kernel = reference.ReferenceBackend().bind(problem, call)

        def backward(call: Any, out: Tensor, lse: Tensor, *grads: Any) -> Any:
            told.append(lse)
            return kernel.backward(call, out, lse, *grads)

        return SimpleNamespace(forward=forward, backward=backward)

    fake = SimpleNamespace(name="cudnn", gives_lse=True, reads_lse=True, reasons=lambda p: [], bind=bind)
    backend = registry.backend
    monkeypatch.setattr(registry, "backend", lambda name: fake if name == "cudnn" else backend(name))
    if entry == "operator":
        monkeypatch.setattr("fastattn.dispatch.eager.plain", lambda *tensors: False)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with fastattn.use_backend("cudnn", "torch"):
        out = fastattn.scaled_dot_product_attention(q, k, v, mask="causal")
    if forgotten == "waited":
        clock.now += 100
    else:
        fastattn.clear_plans()
    assert inputs.grad_out is not None
    out.backward(inputs.grad_out)
    found = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name, x in found.items():
        assert x is not None
        torch.testing.assert_close(x.double(), want[name].double(), rtol=1e-4, atol=1e-5)
    assert len(told) == (entry == "operator")
    for lse in told:
        expected = fastattn.scaled_dot_product_attention(q, k, v, mask="causal", return_lse=True)[1]
        torch.testing.assert_close(lse, expected.detach())


# Plans.


class _NotSupported(RuntimeError):
    pass


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """cuDNN, of which `state.error` comes out of a build."""
    state = SimpleNamespace(error=None)

    def build(cudnn: Any, key: Any, handle: Any) -> Any:
        raise state.error

    monkeypatch.setattr(plan_module.graphs, "build", build)
    library = SimpleNamespace(cudnnGraphNotSupportedError=_NotSupported, create_handle=lambda: 1)
    use_library(monkeypatch, library)
    return state


@pytest.mark.parametrize(
    "error, kind",
    [
        (_NotSupported("no engine"), PlanError),
        (_NotSupported("CUDNN_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("something new"), Setback),
        (torch.OutOfMemoryError("torch's"), torch.OutOfMemoryError),
        (OutOfMemory("cuDNN does not start"), OutOfMemory),
    ],
    ids=repr,
)
def test_a_plan_that_is_not_built(error: Exception, kind: type, building: SimpleNamespace) -> None:
    building.error = error
    with pytest.raises(kind) as raised:
        Plan.build(PlanKey("forward", 0, ()))
    assert type(raised.value) is kind


def test_no_memory_for_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> Any:
        raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(runtime, "frontend", lambda: runtime.Frontend(SimpleNamespace(create_handle=create), 91900, ""))
    for short, kind in ((False, Setback), (True, OutOfMemory)):
        monkeypatch.setattr(runtime, "memory_is_short", lambda index, short=short: short)
        with pytest.raises(kind, match="NOT_INITIALIZED") as raised:
            runtime._new_handle(0)
        assert type(raised.value) is kind


def test_a_plan_file_survives_a_lack_of_memory(building: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[Any] = []
    monkeypatch.setattr(plan_module.disk, "load", lambda key: b"plan")
    monkeypatch.setattr(plan_module.disk, "discard", gone.append)
    for text, expected in ((MEMORY[0], 0), ("not a graph of this version", 1)):

        def pygraph(handle: Any, text: str = text) -> Any:
            raise RuntimeError(text)

        use_library(monkeypatch, SimpleNamespace(pygraph=pygraph))
        assert Plan.load(PlanKey("forward", 0, ())) is None
        assert len(gone) == expected


@pytest.mark.parametrize("text", [MEMORY[0], "something new"])
def test_a_plan_that_was_not_built_keeps_no_frame_alive(
    text: str, building: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See `test_what_failed_keeps_no_tensor_alive`."""

    def build(*arguments: Any) -> Any:
        raise RuntimeError(text)

    def use() -> weakref.ref[Tensor]:
        mine = torch.ones(1)
        with contextlib.suppress(Setback):
            Plan.build(PlanKey("forward", 0, ()))
        return weakref.ref(mine)

    monkeypatch.setattr(plan_module.graphs, "build", build)
    gc.collect()
    gc.disable()
    try:
        assert use()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [OutOfMemory(), torch.OutOfMemoryError(), MemoryError(), Setback()], ids=repr)
def test_a_background_build_without_memory_is_tried_again_ever_more_rarely(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, state, tries = Clock(), SimpleNamespace(error=error), []
    static, dynamic = PlanKey("forward", 0, (), 1), PlanKey("forward", 0, ())

    def build(key: Any) -> Any:
        if key == static:
            tries.append(clock.now)
            if state.error is not None:
                raise state.error
        return SimpleNamespace(key=key, store=lambda: None)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    cache = Plans(load=lambda key: None, build=build, clock=clock.monotonic, delay=0.0)

    def call() -> Any:
        clock.now += 1.1 * plan_policy.OCCASION
        found = cache.best(static, dynamic, trained=True)
        assert cache.wait(10)
        return found.key

    with pytest.warns(fastattn.FastattnWarning, match="could not be built in the background"):
        for _ in range(400):
            assert call() == dynamic
    assert 4 <= len(tries) <= 7
    apart = [b - a for a, b in pairwise(tries)]
    assert apart[0] >= plan_policy.FIRST_RETRY and all(b > 1.8 * a for a, b in pairwise(apart))
    state.error = None
    for _ in range(800):
        call()
    assert call() == static
    assert cache.stats()["background_failures"] == len(tries) - 1


def test_without_a_thread_a_plan_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    submitted: list[Any] = []
    worker: Any = SimpleNamespace(submit=lambda task, delay=0.0: bool(submitted.append(task)))
    key, larger = PlanKey("forward", 0, ()), PlanKey("forward", 0, (), 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cache = Plans(
        load=lambda key: None,
        build=lambda key: SimpleNamespace(key=key, store=lambda: None),
        clock=clock.monotonic,
        worker=worker,
    )
    cache.get(larger)
    for _ in range(2):
        assert cache.best(None, key, lambda: [larger]).key == larger
    assert len(submitted) == 1
    clock.now += 1.1 * plan_policy.FIRST_RETRY
    cache.best(None, key, lambda: [larger])
    assert len(submitted) == 2
    assert cache.candidates.state(key) is State.FAILED, "and it is tried again"
    clock.now += 2.1 * plan_policy.FIRST_RETRY
    cache.best(None, key, lambda: [larger])
    assert len(submitted) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", None])
def test_a_full_gpu(backend: str | None, seed: int) -> None:
    """All memory taken, by torch and beside it: a call is right or out of memory, and a fused kernel's once there is
    some."""
    fastattn.clear_plans()
    case = Case(batch=1, q_heads=8, kv_heads=2, q_len=777, kv_len=777, head_dim=128, dtype=BF16, mask="causal")
    inputs = make(case, "cuda", seed)
    want = reference_results(inputs)
    torch.cuda.synchronize()
    taken = []
    for size in (1 << 30, 64 << 20, 2 << 20):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    for _ in range(3):
        with contextlib.suppress(torch.OutOfMemoryError):
            assert_right(case, inputs, run_case(inputs, backend, poison=False), want)
    del taken
    torch.cuda.empty_cache()
    refusals._refusals.clear()  # as time would
    before = fastattn.stats()["calls"]
    assert_right(case, inputs, run_case(inputs, backend, poison=False), want)
    served = {name for name, count in fastattn.stats()["calls"].items() if count > before.get(name, 0)}
    assert served in ([{"cudnn"}] if backend else [{"cudnn"}, {"hopper"}])


def test_a_problem_is_what_is_passed_over(moody: Moody, clock: Clock, seed: int) -> None:
    inputs, other = make(CASE, seed=seed), make(CASE.but(q_len=5), seed=seed)
    moody.error = RuntimeError(MEMORY[0])
    with pytest.warns(fastattn.FastattnWarning):
        run_case(inputs, poison=False)
    moody.error = None
    assert served(other)[1] == ["torch"]
