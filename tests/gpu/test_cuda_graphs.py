"""CUDA graphs, streams and threads: the device is never waited for, and never runs ahead of its inputs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from caches import own_caches
from cases import BF16, Case, Inputs, assert_right, errors, make, reference_results, relative_error, run
from torch import Tensor

import fastattn
from fastattn import Intervals
from fastattn.backends.cudnn import plans
from fastattn.backends.cudnn.graphs import PlanKey

# Here the reference is asked for on purpose.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")]

BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16, mask="causal")
DECODE = BASE.but(q_len=1, kv_len=700)
BACKENDS = ("decode", "cudnn", "torch", "reference")
#: Calls whose masks are data on the device, and that every backend serves.
ON_DEVICE = {
    "causal": DECODE,
    "lengths": DECODE.but(kv_lengths=(700, 33)),
    "intervals": DECODE.but(mask="intervals:bq", q_len=2),
    "window": DECODE.but(window=(100, 0), kv_lengths=(650, 700), q_len=3),
    "bool": DECODE.but(mask="bool:b1qk", q_len=4),
    "additive": DECODE.but(mask="additive:b11k"),
}


def refill(inputs: Inputs, case: Case, seed: int) -> Inputs:
    """New data in the same memory; returns what it was copied from."""
    fresh = make(case, "cuda", seed)
    pairs = [(getattr(inputs, n), getattr(fresh, n)) for n in ("q", "k", "v", "grad_out", "grad_lse")]
    for name, x in inputs.options.items():
        pairs += zip(
            *(list(o[name]) if isinstance(x, Intervals) else [o[name]] for o in (inputs.options, fresh.options))
        )
    with torch.no_grad():
        for old, new in pairs:
            if isinstance(old, Tensor):
                old.copy_(new)
    return fresh


def capture(call: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # builds what has to be built: a capture records only what runs
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_graph_reads_its_masks_when_it_is_replayed(name: str, backend: str, seed: int) -> None:
    case = ON_DEVICE[name]
    inputs = make(case, "cuda", seed)
    graph, results = capture(lambda: run(inputs, backend, poison=False))
    kv_lengths = ((700, 700), (1, 512), (0, 69)) if case.kv_lengths else (None,) * 3
    for turn, lengths in enumerate(kv_lengths):
        again = case.but(kv_lengths=lengths)
        fresh = refill(inputs, again, seed + 1 + turn)
        results["out"].fill_(torch.nan)
        graph.replay()
        assert_right(again, fresh, results)


@pytest.mark.parametrize("backend", ["cudnn", "torch", "reference"])
@pytest.mark.parametrize("case", [BASE, BASE.but(kv_lengths=(129, 20)), BASE.but(mask="bool:b1qk")], ids=str)
def test_graph_of_a_training_step(case: Case, backend: str, seed: int) -> None:
    case = case.but(grads="qkv")
    inputs = make(case, "cuda", seed)
    graph, results = capture(lambda: run(inputs, backend, poison=False))
    for turn in (1, 2):
        fresh = refill(inputs, case, seed + turn)
        graph.replay()
        assert_right(case, fresh, results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grads", ["", "qkv"])
def test_works_on_the_current_stream(grads: str, backend: str, seed: int) -> None:
    """The inputs become right late, on a stream of their own: work on any other stream would read NaN."""
    case = (DECODE if backend == "decode" else BASE).but(grads=grads)
    if backend == "decode" and grads:
        pytest.skip("decode has no gradients")
    inputs = make(case, "cuda", seed)
    values = [x.detach().clone() for x in (inputs.q, inputs.k, inputs.v)]
    want = reference_results(inputs)
    run(inputs, backend)  # builds plans and kernels, so that nothing but the stream holds the next call up
    with torch.no_grad():
        for x in (inputs.q, inputs.k, inputs.v):
            x.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: about 60 ms
        with torch.no_grad():
            for x, value in zip((inputs.q, inputs.k, inputs.v), values):
                x.copy_(value)
        got = run(inputs, backend, poison=False)
    stream.synchronize()
    assert_right(case, inputs, got, want)


@pytest.mark.parametrize("backend", ["decode", "cudnn", "torch"])
def test_threads_with_streams_of_their_own(backend: str, seed: int) -> None:
    base = DECODE if backend == "decode" else BASE.but(grads="qkv")
    cases = [base.but(kv_len=base.kv_len + n, q_len=1 if backend == "decode" else 129 + n) for n in range(4)]
    prepared = [(case, make(case, "cuda", seed + n)) for n, case in enumerate(cases)]
    wants = [reference_results(inputs) for _, inputs in prepared]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(12):
                    n = (index + turn) % len(cases)
                    case, inputs = prepared[n]
                    found = errors(case, inputs, run(inputs, backend, poison=False), wants[n])
                    if max(found.values()) > 1:
                        failures.append(f"thread {index}, turn {turn}, {case}: {found}")
        except Exception as error:
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, torch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_nothing_is_read_on_the_host(name: str, backend: str, seed: int) -> None:
    case = ON_DEVICE[name].but(grads="" if backend == "decode" else "qkv")
    inputs = make(case, "cuda", seed)
    run(inputs, backend)
    with no_waiting():
        got = run(inputs, backend, poison=False)
    assert_right(case, inputs, got)


def test_varlen_reads_nothing_on_the_host() -> None:
    q, k = (torch.randn(300, h, 64, device="cuda", dtype=BF16) for h in (8, 2))
    cu = torch.tensor([0, 100, 100, 257, 300], dtype=torch.int32, device="cuda")
    fastattn.varlen_attention(q, k, k, cu, cu, causal=True)
    with no_waiting():
        got = fastattn.varlen_attention(q, k, k, cu, cu, causal=True)
    want = fastattn.varlen_attention(q.double(), k.double(), k.double(), cu, cu, causal=True)
    assert relative_error(got, want) < 4e-3


def test_plans_are_built_in_the_background_while_another_thread_captures(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's captures are "global": what a thread without leave allocates or loads meanwhile would end them.

    With a cache and a worker of the test's own: nothing that another test asked for is built, or counted, here.
    """
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    assert plans.shared.wait(120), "what other tests left to be built"
    own_caches(monkeypatch)  # routes that are bound to the other plans
    keys: list[PlanKey] = []

    class Asked(plans.Plans):
        def best(self, static: Any, *rest: Any) -> Any:
            keys.append(static)
            return super().best(static, *rest)

    cache = Asked(occasion=math.inf)  # nothing is built but by the submit below
    monkeypatch.setattr(plans, "shared", cache)
    case = BASE.but(q_len=211, kv_len=211)
    inputs = make(case, "cuda", seed)
    run(inputs, "cudnn")
    assert cache.wait(60) and cache.stats()["background_builds"] == 0 and keys[0] is not None
    began, go_on = threading.Event(), threading.Event()

    def build() -> None:
        began.set()
        assert go_on.wait(60)
        cache._build(keys[0])

    cache._worker.submit(build)
    assert began.wait(60)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        go_on.set()  # so that all of the build lies within the capture
        while True:
            got = run(inputs, "cudnn", poison=False)
            if cache.wait(0.002):
                break
    assert cache.cache.find(keys[0]) is not None
    after = cache.stats()
    assert (after["background_builds"], after["background_failures"]) == (1, 0), after
    fresh = refill(inputs, case, seed + 1)
    graph.replay()
    assert_right(case, fresh, got)
