"""Timing of calls that are compared with one another: they take turns, because a machine's speed drifts.

GPU time is taken from a CUDA graph that holds many calls, so that the host's cost does not count; on a CPU there is
only the time that passes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import torch

from .._compat import torch as torch_internals
from ..backends.triton.binaries.store import shared as binaries
from ..dispatch.native import calls as native

ROUNDS = 9
REPLAY_US = 3000.0  #: GPU time that one replay should take at the least: the gap before its first kernel is some us
MOST_CALLS = 2048  #: in one graph
QUEUED = 16  #: calls put behind a busy GPU at a time: the launch queue holds 1024 launches, a call makes up to 15
BUSY = 1 << 20, 1 << 30  #: cycles for which the GPU is kept busy meanwhile: at first, and at the most (0.6 s)
WALL_SECONDS = 0.002  #: per round on a CPU

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    us: float  #: the median of the rounds
    min_us: float
    max_us: float
    method: str  #: "graph", "queue" (events around launches behind a busy GPU) or "wall"
    note: str | None = None  #: why it was measured by another method
    quarters_us: tuple[float, float] | None = field(default=None, compare=False)  #: quartiles of the rounds

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Contender:
    """An implementation that is timed."""

    name: str
    calls: Sequence[Call]  #: the same call on different memory, made in turn: more than the L2 cache holds
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  #: what has to be in force while it is called


Timings = dict[str, Timing | Exception]


def race(contenders: Sequence[Contender], device: torch.device, eager: bool = False, rounds: int = ROUNDS) -> Timings:
    """The GPU's time per call (on a CPU the time that passes), or what a contender raised.

    eager: the calls as they are, not captured in a graph: in there an implementation may launch other kernels.
    On a GPU the current stream must not be the default one, which cannot be captured.
    """
    lanes: dict[str, _Lane] = {}
    found: Timings = {}
    for contender in contenders:
        try:
            lanes[contender.name] = _lane(contender, device, eager)
        except Exception as error:
            found[contender.name] = error
    samples: dict[str, list[float]] = {name: [] for name in lanes}
    for i in range(rounds + 1):
        for name, lane in list(lanes.items()):
            try:
                us = lane.sample()
            except Exception as error:
                found[name] = error
                del lanes[name]
                continue
            if i:  # the first round only warms up
                samples[name].append(us)
    for name, lane in lanes.items():
        values = samples[name]
        found[name] = timing_of(values, lane.method, lane.note)
    return found


def timing_of(values: Sequence[float], method: str, note: str | None = None) -> Timing:
    """What some rounds, in microseconds of a call, come to."""
    return Timing(statistics.median(values), min(values), max(values), method, note, quartiles(values))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value itself."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, high


def once(call: Call, device: torch.device) -> tuple[Any, float]:
    """The result of a call, and the milliseconds until it was there."""
    synchronize(device)
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return result, (time.perf_counter() - begin) * 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of some milliseconds the median and the worst."""
    return {"median_ms": statistics.median(values), "worst_ms": max(values)}


def wait_for_compilers(timeout: float = 600.0) -> None:
    """Waits until none of our kernels is being compiled, nor the native module: for each of the two up to so many
    seconds."""
    binaries.wait(timeout)
    native.wait(timeout)


def synchronize(device: torch.device) -> None:
    """Waits until all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text_of(error: Exception) -> str:
    """The first line of an error, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _lane(contender: Contender, device: torch.device, eager: bool) -> _Lane:
    if device.type != "cuda":
        return _Wall(contender)
    queue = _Queue(contender)
    if eager:
        return queue
    rough = queue.sample()  # before the capture too: what is compiled or planned by the first call cannot be captured
    try:
        return _Graph(contender, calls_in_graph(len(contender.calls), rough))
    except Exception as error:
        torch.cuda.synchronize(device)  # if it was no refusal to be captured but a fault, this raises it
        queue.note = f"not captured in a graph: {text_of(error)}"
        return queue


def calls_in_graph(sets: int, rough_us: float) -> int:
    """How many calls to capture: each input set as often as any other, and enough of them for one replay."""
    times = math.ceil(REPLAY_US / (max(rough_us, 1.0) * sets))
    return sets * max(1, min(times, MOST_CALLS // sets))


class _Graph:
    method = "graph"
    note: str | None = None

    def __init__(self, contender: Contender, count: int) -> None:
        self._count = count
        self._graph = torch.cuda.CUDAGraph()
        self._start, self._end = _event(), _event()
        with contender.context():
            # "thread_local": the thread in which autograd runs a backward may do what it likes.
            capture = torch.cuda.graph(
                self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            )
            with capture:
                for call in islice(cycle(contender.calls), count):
                    call()
        self._graph.replay()

    def sample(self) -> float:
        torch.cuda.synchronize()
        torch_internals.spin(BUSY[0])  # else the time would begin when the launch does, on the host
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3 / self._count


class _Queue:
    method = "queue"

    def __init__(self, contender: Contender) -> None:
        self.note: str | None = None
        self._context = contender.context
        self._calls = cycle(contender.calls)
        self._count = QUEUED
        self._cycles, self._most = BUSY
        self._start, self._end = _event(), _event()
        with self._context():
            next(self._calls)()

    def sample(self) -> float:
        with self._context():
            while True:
                torch.cuda.synchronize()
                torch_internals.spin(self._cycles)
                self._start.record()
                for call in islice(self._calls, self._count):
                    call()
                self._end.record()
                ahead = not self._start.query()  # the GPU has not begun: it will never wait for the host
                self._end.synchronize()
                if ahead or self._cycles >= self._most:
                    break
                self._cycles *= 2
        if not ahead:
            self.note = "the GPU waited for the host at times"
        us = self._start.elapsed_time(self._end) * 1e3 / self._count
        self._count = max(2, min(QUEUED, math.ceil(REPLAY_US / max(us, 1.0))))  # of long calls a few are enough
        return us


class _Wall:
    method = "wall"
    note: str | None = None

    def __init__(self, contender: Contender) -> None:
        self._context = contender.context
        self._calls = contender.calls
        with self._context():
            for call in self._calls:
                call()

    def sample(self) -> float:
        count, begin = 0, time.perf_counter()
        with self._context():
            while True:
                for call in self._calls:
                    call()
                count += len(self._calls)
                seconds = time.perf_counter() - begin
                if seconds >= WALL_SECONDS:
                    return seconds * 1e6 / count


_Lane = _Graph | _Queue | _Wall  #: one contender, ready to run: `sample` takes the microseconds of a call


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
