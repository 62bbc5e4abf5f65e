"""`fastattn sweep plans`: what a plan for any length costs, and what it saves.

An exact plan (made for one shape) computes faster but has to be built for every new length; the any-length plan is
built once. GPU time of both, the host's cost of a call, calls of lengths never seen before, and first calls in new
processes.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .. import stats
from . import calls, timing
from .calls import IMPLEMENTATIONS, Case, Inputs
from .rows import Row, Sweep, quotient, spread, time_of

NAMES = ("fastattn-any", "fastattn-exact", "torch-cudnn", "torch-flash")
CHECKED = 25  #: of the fresh lengths, compared with the reference
LEAST_CHECKED = 16  #: of fewer keys the gradients of q and k cancel, of one key to 0: no measure for an error
CHILD_SECONDS = 60
METHOD = {
    "causal forward, causal backward": "GPU time: a CUDA graph of many calls on input sets that together exceed the L2 "
    "cache, replayed in turns. In a graph an any-length call computes its offsets each time, which outside it does "
    "once per shape: `eager` is the GPU time of the same calls launched one by one behind a busy GPU.",
    "host": "the host's time per call while nobody waits, in inference mode, the best of several batches",
    "fresh lengths": "FASTATTN_PLANS=any; each length once, synchronized before and after; warm: what one call of the "
    "largest length had built or loaded before; builds and disk_loads: what the fresh lengths did, while the caller "
    "waited",
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
    sweep.add("fresh lengths", "forward and backward", partial(_fresh_lengths, sweep))
    sweep.add("fresh lengths", "chunks over a cache", partial(_fresh_chunks, sweep))
    _first_calls(sweep)


def _any_and_exact(sweep: Sweep, case: Case, kind: str) -> Row:
    row = sweep.compare(case, NAMES, kind=kind, eager=True)
    row["ratios"] = {
        f"any/exact{suffix}": quotient(time_of(row, "fastattn-any", key), time_of(row, "fastattn-exact", key))
        for suffix, key in (("", None), (" eager", "eager"))
    }
    return row


def _fresh_lengths(sweep: Sweep) -> Row:
    longest, count = sweep.pick((8192, 200), (8192, 20), (64, 3))
    rng = random.Random(sweep.seed)
    lengths = rng.sample(range(1, longest + 1), count)
    fit = [n for n in lengths if n >= LEAST_CHECKED]
    checked = set(rng.sample(fit, min(CHECKED, len(fit))))
    generator = torch.Generator(sweep.device).manual_seed(sweep.seed)
    before = stats()["plans"]
    with IMPLEMENTATIONS["fastattn-any"].active(gradients=True):
        _train(sweep, longest, generator, False)
        warm = stats()["plans"]
        done = [_train(sweep, n, generator, n in checked) for n in lengths]
    forward, backward, errors = zip(*done, strict=True)
    figures = {"lengths": count, **_plan_counts(before, warm)}
    figures |= {f"forward_{key}": value for key, value in spread(forward).items()}
    figures |= {f"backward_{key}": value for key, value in spread(backward).items()}
    return _with_errors(figures, errors)


def _train(sweep: Sweep, n: int, generator: torch.Generator, check: bool) -> tuple[float, float, tuple[float, ...]]:
    """Milliseconds of the forward and the backward at a length, and their relative errors if they are checked."""
    case = Case(n, n, q_heads=8, kv_heads=2)
    (x,) = calls.make_inputs(case, sweep.device, generator, 1)
    x = x._replace(**{name: getattr(x, name).detach().requires_grad_() for name in "qkv"})
    out, forward_ms = timing.once(IMPLEMENTATIONS["fastattn-any"].bind(case, x), sweep.device)
    backward = partial(torch.autograd.grad, out, (x.q, x.k, x.v), x.grad_out)
    gradients, backward_ms = timing.once(backward, sweep.device)
    if not check:
        return forward_ms, backward_ms, ()
    expected = calls.truth(case, x, backward=True)
    errors = calls.relative_error((out.detach(),), expected[:1]), calls.relative_error(gradients, expected[1:])
    return forward_ms, backward_ms, errors


def _fresh_chunks(sweep: Sweep) -> Row:
    longest, count = sweep.pick((8192, 50), (8192, 10), (64, 3))
    rng = random.Random(sweep.seed)
    generator = torch.Generator(sweep.device).manual_seed(sweep.seed)
    base = Case(longest, longest, q_heads=8, kv_heads=2, head_major=True)
    (whole,) = calls.make_inputs(base, sweep.device, generator, 1)
    pairs = list(_pairs(rng, longest, count))
    checked = set(rng.sample(range(count), min(CHECKED, count)))
    before = stats()["plans"]
    with IMPLEMENTATIONS["fastattn-any"].active():
        _chunk(sweep, whole, longest // 2, longest, False)
        warm = stats()["plans"]
        done = [_chunk(sweep, whole, *pair, i in checked) for i, pair in enumerate(pairs)]
    times, errors = zip(*done, strict=True)
    figures = {"lengths": count, **_plan_counts(before, warm)}
    figures |= {f"forward_{key}": value for key, value in spread(times).items()}
    return _with_errors(figures, errors)


def _pairs(rng: random.Random, longest: int, count: int) -> Iterator[tuple[int, int]]:
    """(Sq, Skv) with Sq <= Skv."""
    for _ in range(count):
        kv_len = rng.randint(1, longest)
        yield rng.randint(1, kv_len), kv_len


def _chunk(sweep: Sweep, whole: Inputs, q_len: int, kv_len: int, check: bool) -> tuple[float, tuple[float, ...]]:
    """Milliseconds of a chunk of a prefill: its queries are a part of their tensor, its K/V slices of the cache."""
    case = Case(q_len, kv_len, q_heads=8, kv_heads=2, head_major=True)
    x = whole._replace(q=whole.q[:, :, :q_len], k=whole.k[:, :, :kv_len], v=whole.v[:, :, :kv_len])
    out, ms = timing.once(IMPLEMENTATIONS["fastattn-any"].bind(case, x), sweep.device)
    return ms, (calls.relative_error((out,), calls.truth(case, x, backward=False)),) if check else ()


def _with_errors(figures: dict[str, float], errors: Sequence[tuple[float, ...]]) -> Row:
    """A row of the figures and the largest relative errors: of the outputs and, if there are any, of the gradients."""
    checked = [found for found in errors if found]
    row: Row = {"figures": figures | {"checked": len(checked)}}
    limits = {"error": calls.OUTPUT_LIMIT, "gradient_error": calls.GRADIENT_LIMIT}
    for (name, limit), found in zip(limits.items(), zip(*checked, strict=True)):
        worst = max(found, key=lambda error: (math.isnan(error), error))
        row["figures"][f"largest_{name}"] = worst if math.isfinite(worst) else None
        try:
            calls.check_error(worst, limit)
        except ValueError as error:
            row["error"] = str(error)
    return row


def _plan_counts(before: dict[str, float], warm: dict[str, float]) -> dict[str, float]:
    after = stats()["plans"]
    found = {f"warm_{key}": warm[key] - before[key] for key in ("builds", "disk_loads")}
    return found | {key: after[key] - warm[key] for key in ("builds", "disk_loads")}


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
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.bench.first_call", name, device, str(length)],
        env=variables | {"FASTATTN_PLAN_CACHE": plan_cache},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"length": length, "figures": {f"{step} ms": value for step, value in found.items()}}
