"""Many threads, many kinds of calls, at once: every result is right, nobody waits for ever, nothing grows."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import random
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import BF16, FP32, TOLERANCE, Case, Inputs, make, reference_results, refusals, run
from torch import Tensor

import fastattn
from fastattn.backends.cudnn import plans
from fastattn.dispatch import fast_path, routes

THREADS = 8
GPU_CALLS, CPU_CALLS = 5000, 800  #: of each of a test's two runs
LIMIT = 120.0  #: seconds that a run may take; it takes a tenth of that
GROWTH = 64 << 20  #: bytes on the GPU that may stay: offsets for each stream, and the autograd thread's scratch memory

BASE = Case(batch=2, q_heads=8, kv_heads=2, q_len=129, kv_len=129, head_dim=128, dtype=BF16, mask="causal")
CACHE = BASE.but(layout="cache")
TRAIN = BASE.but(grads="qkv")
CASES = {
    "prefill 65": BASE.but(q_len=65, kv_len=65),
    "prefill 129": BASE,
    "prefill 300": BASE.but(q_len=300, kv_len=300, layout="bshd"),
    "prefill 511": BASE.but(q_len=511, kv_len=511, batch=1),
    "no mask": BASE.but(q_len=100, kv_len=100, mask="none"),
    "chunk": CACHE.but(q_len=100, kv_len=400),
    "window": BASE.but(q_len=300, kv_len=300, window=(64, 0)),
    "sinks": BASE.but(q_len=200, kv_len=200, sinks=FP32),
    "left padding": BASE.but(q_len=257, kv_len=257, mask="segments:pc"),
    "packed": BASE.but(q_len=190, kv_len=190, mask="segments:3c"),
    "decode": CACHE.but(q_len=1, kv_len=700),
    "decode, lengths": CACHE.but(q_len=1, kv_len=2049, kv_lengths=(2049, 33)),
    "few queries, window": CACHE.but(q_len=4, kv_len=700, window=(100, 0)),
    "training 65": TRAIN.but(q_len=65, kv_len=65),
    "training 129": TRAIN,
    "training 300": TRAIN.but(q_len=300, kv_len=300, layout="bshd"),
    "training, window": TRAIN.but(q_len=200, kv_len=200, window=(64, 0)),
    "training, sinks": TRAIN.but(q_len=150, kv_len=150, sinks=FP32, grads="qkvs"),
    "training, left padding": TRAIN.but(q_len=180, kv_len=180, mask="segments:pc"),
    "training, packed": TRAIN.but(q_len=140, kv_len=140, mask="segments:3c"),
}
MEMORIES = fast_path._cached, routes._routes
NARROW = sum(not case.grads for case in CASES.values()) - 2  #: only calls without gradients take the fast path
RESULTS = ("out", "dq", "dk", "dv", "ds")


class Ready(NamedTuple):
    """A case with its inputs and what is true for them."""

    case: Case
    inputs: Inputs
    want: dict[str, Tensor]

    def limit(self, result: str) -> float:
        forward, backward = TOLERANCE[self.case.dtype]
        return {"out": forward, "ds": 2 * backward}.get(result, backward)


Turn = tuple[str, str | None]  #: a case's name, and the backend that is asked for


class Prepared:
    """All cases on a device. One thread alone has called each of them and got it right: plans and kernels are there."""

    def __init__(self, device: str, seed: int) -> None:
        self.on_gpu = device == "cuda"
        self.cases: dict[str, Ready] = {}
        self.turns: list[Turn] = []  #: all that there are
        for n, (name, case) in enumerate(CASES.items()):
            case = case if self.on_gpu else small(case)
            inputs = make(case, device, seed + n)
            self.cases[name] = Ready(
                case, inputs, {result: x.float() for result, x in reference_results(inputs).items()}
            )
            asked = ("cudnn",) if self.on_gpu else ("torch", "reference")
            backends = [None] if self.on_gpu else []
            backends += [backend for backend in asked if not refusals(inputs, backend)]
            self.turns += [(name, backend) for backend in backends]
        if self.on_gpu:
            torch.cuda.synchronize()
        alone = Caller(self, self.turns * 2, threading.Barrier(1))
        alone.run()
        assert [*alone.failures(), *alone.wrong()] == []


def small(case: Case) -> Case:
    """The same kind of call, for a CPU."""
    q_len, kv_len = -(-case.q_len // 8), -(-case.kv_len // 8)
    kv_lengths = case.kv_lengths and tuple(-(-n // 8) for n in case.kv_lengths)
    window = case.window and (case.window[0] // 8, case.window[1])
    return case.but(q_len=q_len, kv_len=kv_len, kv_lengths=kv_lengths, window=window, head_dim=16, dtype=FP32)


def own(inputs: Inputs) -> Inputs:
    """The same memory under leaves of their own: threads that know nothing of one another share no autograd graph."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves.items()}
    q, k, v = (leaves.get(name, getattr(inputs, name)) for name in "qkv")
    options = inputs.options | ({"sinks": leaves["s"]} if "s" in leaves else {})
    return dataclasses.replace(inputs, q=q, k=k, v=v, options=options, leaves=leaves)


class Caller(threading.Thread):
    """A thread that makes calls, on a GPU on a stream of its own."""

    def __init__(self, prepared: Prepared, turns: Sequence[Turn], gate: threading.Barrier) -> None:
        super().__init__(daemon=True)  # one that waits for ever shall not keep the process from ending
        self.turns = turns
        self.done = 0
        self.errors: list[list[float]] = []  #: of each turn the relative errors of RESULTS, 0 where there is none
        self.failure: Exception | None = None
        self._prepared, self._gate = prepared, gate

    def run(self) -> None:
        try:
            self._gate.wait(LIMIT)
            with torch.cuda.stream(torch.cuda.Stream()) if self._prepared.on_gpu else nullcontext():
                self._call()
        except Exception as error:
            self.failure = error

    def _call(self) -> None:
        cases = {name: kind._replace(inputs=own(kind.inputs)) for name, kind in self._prepared.cases.items()}
        sizes = {name: {result: x.norm() for result, x in kind.want.items()} for name, kind in cases.items()}
        errors = sizes["decode"]["out"].new_zeros(len(self.turns), len(RESULTS))
        for turn, (name, backend) in enumerate(self.turns):
            want = cases[name].want
            got = run(cases[name].inputs, backend, poison=False)
            assert got.keys() == want.keys()
            for result, x in got.items():  # nothing here waits for the GPU: calls of all threads are under way on it
                error = errors[turn, RESULTS.index(result)]
                torch.div(torch.linalg.vector_norm(x - want[result]), sizes[name][result], out=error)
            self.done += 1
        self.errors = errors.tolist()

    def failures(self) -> list[str]:
        return [] if self.failure is None else [f"{self.name}, {self.turns[self.done :][:1]}: {self.failure!r}"]

    def wrong(self) -> Iterator[str]:
        for (name, backend), found in zip(self.turns, self.errors):
            for result, error in zip(RESULTS, found):
                if not error <= self._prepared.cases[name].limit(result):  # NaN is wrong too
                    yield f"{self.name}, {name}, {backend or 'any backend'}: relative error of {result}: {error:.2e}"


def stress(prepared: Prepared, calls: int, seed: int, folder: Path) -> None:
    """Makes that many calls, from all threads at once, and looks at every result."""
    gate, rng = threading.Barrier(THREADS), random.Random(seed)
    threads = [Caller(prepared, rng.choices(prepared.turns, k=calls // THREADS), gate) for _ in range(THREADS)]
    deadline = time.monotonic() + LIMIT
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        with (folder / "stacks").open("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            done = ", ".join(f"{thread.name} {thread.done}" for thread in threads)
            pytest.fail(f"threads still run after {LIMIT:.0f} s (calls made: {done})\n{file.read()}")
    failures = [line for thread in threads for line in (*thread.failures(), *thread.wrong())]
    assert not failures, f"{len(failures)} failures in {calls} calls:\n" + "\n".join(failures[:20])
    assert sum(len(thread.errors) for thread in threads) == calls


@pytest.fixture(autouse=True)
def no_deadlock(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Threads that wait for each other while one of them holds the interpreter's lock stop the test's own clock too."""
    with capfd.disabled():
        stderr = os.dup(2)  # the process ends without showing what was captured
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


@contextmanager
def narrow_memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Room for too few kinds of calls: the memories overflow and fill up again while others read them."""
    with monkeypatch.context() as patch:
        for memory in MEMORIES:
            memory.clear()
            patch.setattr(memory, "max_entries", NARROW)
        yield
        for memory in MEMORIES:
            memory.clear()


def remembered() -> list[int]:
    """Kinds of calls that are remembered."""
    # Two threads may both find the last place free.
    assert all(len(memory) <= memory.max_entries + THREADS for memory in MEMORIES)
    return [len(memory) for memory in MEMORIES]


def stress_and_count(
    prepared: Prepared, calls: int, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    """Stress that leaves no more behind in the memories than was there before."""
    before = remembered()
    if not narrow:
        stress(prepared, calls, seed, folder)
        assert all(now <= then for now, then in zip(remembered(), before)), (before, remembered())
        return
    with narrow_memories(monkeypatch):
        stress(prepared, calls, seed, folder)
        assert min(remembered()) > 0


@pytest.mark.parametrize("narrow", [False, True], ids=["room", "narrow"])
def test_threads_on_the_cpu(narrow: bool, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of eight callers would get in each other's way
    try:
        prepared = Prepared("cpu", seed)
        assert {backend for _, backend in prepared.turns} == {"torch", "reference"}
        stress_and_count(prepared, CPU_CALLS, seed, tmp_path, monkeypatch, narrow)
    finally:
        torch.set_num_threads(torch_threads)


@pytest.fixture(scope="module")
def on_gpu() -> Prepared:
    return Prepared("cuda", zlib.crc32(__name__.encode()))


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [False, True], ids=["room", "narrow"])
def test_threads_on_a_gpu(
    narrow: bool, on_gpu: Prepared, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Meanwhile shapes that come back get exact plans, built in the background: both kinds of plans serve."""
    before, served = in_use(), fastattn.stats()["calls"]
    stress_and_count(on_gpu, GPU_CALLS, seed, tmp_path, monkeypatch, narrow)
    served = {name: n - served.get(name, 0) for name, n in fastattn.stats()["calls"].items()}
    assert all(served.get(name, 0) > 300 for name in ("decode", "cudnn", "cudnn.backward")), served
    assert plans.shared.wait()
    after = in_use()
    assert after["bytes"] - before["bytes"] < GROWTH, (before, after)
    assert after["builds"] == before["builds"], "somebody waited for a plan"
    assert after["background_failures"] == before["background_failures"]
    assert after["plans"] <= plans.shared.cache.capacity
    # An exact plan for each forward and each backward, and one for longer calls for some of the backwards.
    assert after["plans"] - before["plans"] <= 2 * len(CASES)


def in_use() -> dict[str, float]:
    """Bytes on the GPU and the counters of the plans, when all that was asked for is done and what can go is gone."""
    torch.cuda.synchronize()
    gc.collect()
    return {"bytes": torch.cuda.memory_allocated(), **fastattn.stats()["plans"]}
