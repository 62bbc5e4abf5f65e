"""Timing of calls that take turns: a GPU is simulated."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from benchmarks.plans import host_cost
from fastattn.bench import timing
from fastattn.bench.timing import Contender, Timing

CPU = torch.device("cpu")


class Gpu:
    """A GPU and its host in simulated microseconds, in place of torch.cuda."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0  # the host's clock; when the GPU has done all that is queued
        self.captured = None
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e6)
        for name, value in {
            "synchronize": self.synchronize, "_sleep": lambda cycles: self.launch(cycles / 1000, 0.0),
            "Event": lambda enable_timing: _Event(self), "CUDAGraph": lambda: _Graph(self), "graph": self.graph,
            "current_stream": lambda: "a stream",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, gpu_us, host_us):
        self.now += host_us
        if self.captured is not None:
            self.captured.append(gpu_us)
        else:
            self.free = max(self.free, self.now) + gpu_us

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert (stream, capture_error_mode) == ("a stream", "thread_local")
        self.captured = graph.kernels
        try:
            yield
        finally:
            self.captured = None


class _Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


class _Graph:
    def __init__(self, gpu):
        self.gpu = gpu
        self.kernels = []

    def replay(self):
        self.gpu.launch(sum(self.kernels), 5.0)


CUDA = torch.device("cuda", 0)


def test_a_graph_hides_what_the_host_costs(monkeypatch):
    gpu = Gpu(monkeypatch)
    slow = [lambda: gpu.launch(10.0, 400.0)] * 7
    found = timing.race([Contender("a", slow), Contender("b", [lambda: gpu.launch(20.0, 1.0)])], CUDA)
    assert found["a"] == Timing(pytest.approx(10.0), pytest.approx(10.0), pytest.approx(10.0), "graph")
    assert found["b"].us == pytest.approx(20.0)
    assert set(found["a"].as_dict()) == {"us", "min_us", "max_us", "method", "quarters_us"}


def test_eager_calls_wait_behind_a_busy_gpu(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = timing.race([Contender("a", [lambda: gpu.launch(10.0, 400.0)] * 3)], CUDA, eager=True)
    assert found["a"] == Timing(pytest.approx(10.0), pytest.approx(10.0), pytest.approx(10.0), "queue")


def test_a_gpu_that_waited_for_the_host_is_told(monkeypatch):
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(timing, "BUSY", (1 << 10, 1 << 12))
    found = timing.race([Contender("a", [lambda: gpu.launch(10.0, 400.0)])], CUDA, eager=True)
    assert found["a"].us > 300.0
    assert found["a"].as_dict()["note"] == "the GPU waited for the host at times"


def test_what_cannot_be_captured_is_timed_in_the_queue(monkeypatch):
    gpu = Gpu(monkeypatch)

    def call():
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.launch(10.0, 30.0)

    found = timing.race([Contender("a", [call])], CUDA)["a"]
    assert (found.us, found.method) == (pytest.approx(10.0), "queue")
    assert found.note == "not captured in a graph: RuntimeError: operation not permitted when stream is capturing"


def test_rounds_go_in_turns_and_a_failure_leaves_the_race(monkeypatch):
    log = []

    class Lane:
        method, note = "fake", None

        def __init__(self, name):
            self.name, self.us = name, iter([100.0, 3.0, 1.0, 2.0])

        def sample(self):
            log.append(self.name)
            if self.name == "b" and log.count("b") == 3:
                raise RuntimeError("gone")
            return next(self.us)

    monkeypatch.setattr(timing, "_lane", lambda contender, device, eager: Lane(contender.name))
    found = timing.race([Contender("a", []), Contender("b", [])], CUDA, rounds=3)
    assert log == ["a", "b", "a", "b", "a", "b", "a"]
    assert found["a"] == Timing(2.0, 1.0, 3.0, "fake")  # the first round does not count
    assert found["a"].quarters_us is not None and 1.0 <= found["a"].quarters_us[0] <= 2.0 <= found["a"].quarters_us[1]
    assert str(found["b"]) == "gone"


def test_host_cost_is_the_best_batch_of_calls_that_nobody_waits_for(monkeypatch):
    gpu = Gpu(monkeypatch)
    costs = iter([50.0] * 100 + [9.0] * 100 + [8.0] * 100 + [12.0] * 100)
    bad = Contender("bad", [lambda: 1 // 0])
    found = host_cost([bad, Contender("a", [lambda: gpu.launch(40.0, next(costs))])], CUDA, batches=3)
    assert found["a"] == Timing(pytest.approx(8.0), pytest.approx(8.0), pytest.approx(12.0), "host")
    assert isinstance(found["bad"], ZeroDivisionError)


@pytest.mark.parametrize(
    "sets, rough, count", [(1, 10.0, 300), (7, 10.0, 301), (3, 5000.0, 3), (511, 1.0, 2044), (1, 0.0, 2048)]
)
def test_calls_in_a_graph(sets, rough, count):
    assert timing.calls_in_graph(sets, rough) == count


def test_contexts_are_in_force_while_called():
    inside = []

    @contextmanager
    def context():
        inside.append(1)
        yield
        inside.pop()

    found = timing.race([Contender("a", [lambda: inside[0]], context), Contender("b", [int], nullcontext)], CPU)
    assert found["a"].method == found["b"].method == "wall"
    assert not inside


def test_quartiles_of_the_rounds():
    assert timing.timing_of([5.0, 1.0, 2.0, 3.0, 4.0], "fake").quarters_us == (2.0, 4.0)
    assert timing.timing_of([7.0], "fake").quarters_us == (7.0, 7.0)
