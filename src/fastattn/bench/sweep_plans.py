"""`fastattn sweep plans`: what a plan for any length costs, and what it saves.

An exact plan (made for one shape) computes faster but has to be built for every new length; the any-length plan is
built once. GPU time of both, the host's cost of a call, calls of lengths never seen before, and first calls in new
processes.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial

from . import sweep_fresh
from .calls import IMPLEMENTATIONS, Case
from .results import child
from .rows import Row, Sweep, quotient, time_of

NAMES = ("fastattn-any", "fastattn-exact", "torch-cudnn", "torch-flash")
CHILD_SECONDS = 60
METHOD = {
    "causal forward, causal backward": "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 "
    "cache, replayed in turns. In a graph an any-length call computes its offsets each time, which outside it does "
    "once per shape: `eager` is the GPU time of the same calls launched one by one behind a busy GPU.",
    "host": "the host's time per call while nobody waits, in inference mode, the best of several batches",
    "fresh lengths": sweep_fresh.METHOD,
    "first call": "milliseconds in a new process, after CUDA, cuBLAS and the inputs; synchronized. Triton's own cache "
    "of compiled kernels is as this machine has it",
}


def run(sweep: Sweep) -> None:
    """Measures all rows."""
    lengths = sweep.pick((256, 300, 512, 777, 1000, 1024, 2048, 2049, 4096, 8192), (300, 2048, 2049), (20, 33))
    for n in lengths:
        sweep.add("causal forward", f"S={n}", partial(_any_and_exact, sweep, Case(n, n), "inference"))
    for n in sweep.pick((1000, 2048, 2049, 4096, 8192), (2049,), (20,)):
        sweep.add("causal backward", f"B=2 S={n}", partial(_any_and_exact, sweep, Case(n, n, batch=2), "backward"))
    n = sweep.pick(128, 128, 16)
    peers = ("torch-cudnn", "torch-flash")
    host = partial(sweep.compare, host=True)
    sweep.add("host", f"causal S={n}", partial(host, Case(n, n), NAMES))
    sweep.add("host", f"Sq=1 Skv={n}", partial(host, Case(1, n, head_major=True), ("fastattn", *peers)))
    sweep_fresh.add_rows(sweep)
    _first_calls(sweep)


def _any_and_exact(sweep: Sweep, case: Case, kind: str) -> Row:
    row = sweep.compare(case, NAMES, kind=kind, eager=True)
    row["ratios"] = {
        f"any/exact{suffix}": quotient(time_of(row, "fastattn-any", key), time_of(row, "fastattn-exact", key))
        for suffix, key in (("", None), (" eager", "eager"))
    }
    return row


def _first_calls(sweep: Sweep) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for label, name, plan_cache in (
            ("fastattn, no plans on disk", "fastattn", folder),
            ("fastattn, plans on disk", "fastattn", folder),
            ("fastattn, no plan cache on disk", "fastattn", "off"),
            ("torch-cudnn", "torch-cudnn", "off"),
        ):
            if IMPLEMENTATIONS[name].cuda_only and sweep.device.type != "cuda":
                sweep.left_out.add(name)
                continue
            sweep.add("first call", label, partial(_first_call, sweep, name, plan_cache))


def _first_call(sweep: Sweep, name: str, plan_cache: str) -> Row:
    variables = {key: value for key, value in os.environ.items() if key != "FASTATTN_PLANS"}
    device = "cpu" if sweep.device.type == "cpu" else f"cuda:{sweep.device.index or 0}"
    length = sweep.pick(2049, 2049, 33)
    variables["FASTATTN_PLAN_CACHE"] = plan_cache
    arguments = name, device, str(length)
    found = child("fastattn.bench.first_call", *arguments, seconds=CHILD_SECONDS, env=variables)
    return {"length": length, "figures": {f"{step} ms": value for step, value in found.items()}}
