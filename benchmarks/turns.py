"""Calls in CUDA graphs, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.timing import quartiles

from .command import captured

FLUSHED = 256 << 20  #: bytes written to flush the L2 cache
Samples = dict[str, dict[str, list[float]]]  #: of each run: "cold", "hot" and "host"


def between(replay: Callable[[], None], times: int = 1) -> float:
    """Microseconds of one replay of a graph."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def kernel_times(work: Callable[[], None]) -> dict[str, list[float]]:
    """The kernels that some work runs on the current GPU, by their names: microseconds of each run, as torch's profiler
    has them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if str(event.device_type).endswith("CUDA"):
            found.setdefault(event.name, []).append(event.device_time_total)
    return found


def repeats(replay: Callable[[], None]) -> int:
    """How many replays in a row take 2 ms, 20 at the most."""
    return max(1, min(20, int(2000 / between(replay, 2))))


def best(replay: Callable[[], None]) -> float:
    """Hot microseconds of a graph: the best of three times."""
    times = repeats(replay)
    return round(min(between(replay, times) for _ in range(3)), 1)


def measure(
    runs: dict[str, Callable[[], Any]], flush: Tensor, rounds: int, needed: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """The medians of `sampled`."""
    return medians(sampled(runs, flush, rounds, needed))


def medians(samples: Samples) -> dict[str, dict[str, float]]:
    return {name: {what: round(statistics.median(x), 1) for what, x in own.items()} for name, own in samples.items()}


def quarters(samples: Samples) -> dict[str, dict[str, list[float]]]:
    """The first and the third quartile."""
    return {
        name: {what: [round(us, 1) for us in quartiles(x)] for what, x in own.items()} for name, own in samples.items()
    }


def sampled(runs: dict[str, Callable[[], Any]], flush: Tensor, rounds: int, needed: Collection[str] = ()) -> Samples:
    """Cold, hot and host microseconds of each, in turns. What cannot run is left out, unless it is needed."""
    graphs: dict[str, Callable[[], None]] = {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run)
        except (RuntimeError, NotImplementedError) as error:
            if name in needed or "CUDA error" in str(error) or "out of memory" in str(error):
                raise
            torch.cuda.synchronize()
    samples: Samples = {name: {"cold": [], "hot": [], "host": []} for name in graphs}
    times = {name: repeats(graph) for name, graph in graphs.items()}
    for _ in range(rounds):
        for name, graph in graphs.items():
            flush.zero_()
            samples[name]["cold"].append(between(graph))
            samples[name]["hot"].append(between(graph, times[name]))
    for name in graphs:
        for _ in range(20):
            start = time.perf_counter()
            runs[name]()
            samples[name]["host"].append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
    return samples
