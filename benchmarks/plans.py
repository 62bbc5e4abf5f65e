"""What a dynamic plan costs, and what it saves: `python -m benchmarks.plans [--json FILE]`.

A static plan (built for one shape) computes faster but has to be built for every new length; the dynamic plan is built
once. GPU time of both, the host's cost of a call, calls of lengths never seen before, and first calls in new processes.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice

import torch

from fastattn.bench import output, results, sweeps
from fastattn.bench.case import Case
from fastattn.bench.runner import Comparison, Figures, Row, Runner
from fastattn.bench.sweeps import Sweep
from fastattn.bench.timing import Contender, Timing, Timings, synchronize
from fastattn.lm.loading.device import pick_device

from . import fresh_lengths
from .command import end, parser_of

NAMES = ("fastattn-dynamic", "fastattn-static", "torch-cudnn", "torch-flash")
CHILD_SECONDS = 60
HOST_CALLS = 100  #: timed at a time, without waiting for results
HOST_BATCHES = 9
METHOD = {
    "causal forward, causal backward": "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 "
    "cache, replayed in turns. In a graph a call of a dynamic plan computes its offsets each time, which outside it "
    "does once per shape: `eager` is the GPU time of the same calls launched one by one behind a busy GPU.",
    "host": "the host's time per call without waiting for results, in inference mode, the best of several batches",
    "fresh lengths": fresh_lengths.METHOD,
    "first call": "milliseconds in a new process, after CUDA, cuBLAS and the inputs; synchronized. Triton's own cache "
    "of compiled kernels is as this machine has it",
}


def rows(runner: Runner) -> Iterator[Comparison | Figures]:
    """All rows, for the runner of the sweeps."""
    for n in runner.pick((256, 300, 512, 777, 1000, 1024, 2048, 2049, 4096, 8192), (300, 2048, 2049), (20, 33)):
        yield Comparison("causal forward", Case(n, n), NAMES, eager=True)
    for n in runner.pick((1000, 2048, 2049, 4096, 8192), (2049,), (20,)):
        yield Comparison("causal backward", Case(n, n, batch=2), NAMES, "backward", eager=True)
    n = runner.pick(128, 128, 16)
    yield Comparison("host", Case(n, n), NAMES, timer=host_cost, derive=False)
    yield Comparison(
        "host", Case(1, n, head_major=True), ("fastattn", "torch-cudnn", "torch-flash"), timer=host_cost, derive=False
    )
    yield from fresh_lengths.rows(runner)
    with tempfile.TemporaryDirectory() as folder:
        for label, name, plan_cache in (
            ("fastattn, no plans on disk", "fastattn", folder),
            ("fastattn, plans on disk", "fastattn", folder),
            ("fastattn, no plan cache on disk", "fastattn", "off"),
            ("torch-cudnn", "torch-cudnn", "off"),
        ):
            if runner.can_run(name):
                yield Figures("first call", label, partial(first_call, runner, name, plan_cache))


def host_cost(contenders: Sequence[Contender], device: torch.device, batches: int = HOST_BATCHES) -> Timings:
    """The host's time per call while the GPU works by itself, or what a contender raised.

    The best of the batches: whatever else the host does only adds to it.
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    found: Timings = {}
    for i in range(batches + 1):
        for contender in contenders:
            if contender.name in found:
                continue
            try:
                us = _host_sample(contender, device)
            except Exception as error:
                found[contender.name] = error
                continue
            if i:
                samples[contender.name].append(us)
    for name, values in samples.items():
        if name not in found:
            found[name] = Timing(min(values), min(values), max(values), "host")
    return found


def _host_sample(contender: Contender, device: torch.device) -> float:
    turn = list(islice(cycle(contender.calls), HOST_CALLS if device.type == "cuda" else 3))
    with contender.context():
        synchronize(device)
        begin = time.perf_counter()
        for call in turn:
            call()
        seconds = time.perf_counter() - begin
        synchronize(device)
    return seconds * 1e6 / len(turn)


def first_call(runner: Runner, name: str, plan_cache: str) -> Row:
    """Milliseconds of the first calls in a process of its own."""
    variables = {key: value for key, value in os.environ.items() if key != "FASTATTN_PLANS"}
    device = "cpu" if runner.device.type == "cpu" else f"cuda:{runner.device.index or 0}"
    length = runner.pick(2049, 2049, 33)
    variables["FASTATTN_PLAN_CACHE"] = plan_cache
    arguments = name, device, str(length)
    found = results.child("benchmarks.first_call", *arguments, seconds=CHILD_SECONDS, env=variables)
    return {"length": length, "figures": {f"{step} ms": value for step, value in found.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 when some row could not be measured or fastattn failed in it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("plans", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows of each kind")
    parser.add_argument("--device", help="cuda or cuda:N; cpu runs tiny shapes, to try the command out")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the inputs and lengths (%(default)s)")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    sweep = Sweep("plans", rows, METHOD)
    command = f"python -m benchmarks.plans {shlex.join(argv)}".rstrip()
    found, failed = sweeps.run(sweep, command, pick_device(arguments.device), arguments.quick, arguments.seed)
    if arguments.json:
        results.write_json(arguments.json, found)
        print(f"Wrote {arguments.json}")
    return int(failed)


if __name__ == "__main__":
    end(main)
