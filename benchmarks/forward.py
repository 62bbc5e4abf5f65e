"""The forward calls of `fastattn sweep users` on each backend that takes them, beside torch's kernels; needs a GPU.

    python -m benchmarks.forward [ROW ...] [--json FILE] [--tune] [--seconds N] [--check | --time]

ROW: words of the names of rows; all rows without any. First every kernel is compiled and compared with the float64
reference, in several processes ("error": norm of the difference over norm). Then times: medians in microseconds of GPU
work, captured in CUDA graphs, "cold" with the L2 cache flushed before each call, "hot" over many calls in a row; "host"
is what one eager call costs the CPU. --tune: many launches of the prefill kernel for each row, hot, instead. --check:
compiles and compares alone; --time: the rest alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
from fastattn.bench import output
from fastattn.bench.timing import text_of
from fastattn.bench.users.calls import Row
from fastattn.bench.users.rows import ROWS as ALL
from fastattn.bench.users.rows import chosen
from fastattn.call import Problem
from fastattn.dispatch.registry import NAMES

from .command import end, write
from .row_commands import call_of, in_time, report, row_parser, tuned
from .turns import FLUSHED, medians, quarters, sampled

ROWS = [row for row in ALL if not row.training]  #: the list of `fastattn sweep users`
OURS = tuple(name for name in NAMES if name not in ("torch", "reference"))
TORCHS = {
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Launches of the prefill kernel that are tried: rows, keys, warps, stages.
LAUNCHES = [
    *product((64,), (32, 64), (4,), (2, 3)),
    *product((64,), (32, 64), (8,), (2, 3)),
    *product((128,), (32, 64), (8,), (2, 3)),
    (64, 128, 4, 2),
    (128, 128, 8, 2),
    (32, 64, 4, 2),
    (32, 32, 4, 2),
]


def contenders(row: Row, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Calls of one row by the name of what serves them."""
    (x,) = row.tensors(device)
    q, k, v = x.q, x.k, x.v
    found: dict[str, Callable[[], Any]] = {}
    ours = row.ours(x)
    refused = fastattn.explain(q, k, v, **ours).reasons
    for name in OURS:
        if not refused[name]:
            found[name] = partial(fastattn.scaled_dot_product_attention, q, k, v, **ours, backend=name)
    theirs = row.theirs(x)
    if theirs is not None:
        mask = theirs.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            theirs["attn_mask"] = mask.to(row.dtype)
        for name, kernel in TORCHS.items():
            grouped = q.shape[1] != k.shape[1]
            if name == "torch efficient" and grouped:  # it has no groups: on keys and values that were repeated before
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                grouped = False
            found[name] = partial(_on_torch, kernel, q, k, v, theirs | {"enable_gqa": grouped})
    return found


def _on_torch(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v, **arguments)


def error_of(index: int) -> dict[str, Any]:
    """Runs each of our backends on a row, for the first time, and compares it with the reference."""
    row, device = ROWS[index], torch.device("cuda")
    (x,) = row.tensors(device)
    q, k, v, ours = x.q, x.k, x.v, row.ours(x)
    want = None
    found: dict[str, Any] = {}
    refused = fastattn.explain(q, k, v, **ours).reasons
    for name in OURS:
        if refused[name]:
            continue
        start = time.perf_counter()
        try:
            got = _first(fastattn.scaled_dot_product_attention(q, k, v, **ours, backend=name))
            seconds = time.perf_counter() - start
            if want is None:
                wide = ours | {"sinks": ours["sinks"].double()} if "sinks" in ours else ours
                want = _first(fastattn.scaled_dot_product_attention(
                    q.double(), k.double(), v.double(), **wide, backend="reference"))  # fmt: skip
            error = ((got.double() - want).norm() / want.norm()).item()
            found[name] = {"error": float(f"{error:.2e}"), "first": round(seconds, 2)}
        except Exception as failure:
            found[name] = {"failed": text_of(failure)}
    return found


def _first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def launches(row: Row) -> list[Any]:
    """Launches of the prefill kernel whose tiles fit the shared memory."""
    from fastattn.backends.triton.limits import usual_shared_memory
    from fastattn.backends.triton.prefill import launch_config

    device = torch.device("cuda", 0)
    problem = Problem.of(call_of(row, device))
    limit = usual_shared_memory(problem.capability)
    tried = (launch_config.Launch(*numbers) for numbers in LAUNCHES)
    return [one for one in tried if launch_config.shared(problem, one) <= limit]


def kernel_of(row: Row, one: Any, call: Any) -> Callable[[], Any]:
    """The prefill kernel with a launch of one's own."""
    from fastattn.backends.triton.prefill.forward import bind

    return partial(bind(Problem.of(call), call, one).forward, call)


def compile_launch(job: tuple[int, Any]) -> None:
    """Compiles one launch for a row, by running it."""
    row = ROWS[job[0]]
    try:
        with torch.inference_mode():
            kernel_of(row, job[1], call_of(row, torch.device("cuda", 0)))()
        torch.cuda.synchronize()
    except Exception as failure:
        print(f"{row.name} {job[1]}: {text_of(failure)[:140]}", file=sys.stderr)


def tune(row: Row) -> dict[str, float]:
    """Hot microseconds of each launch, the quickest first."""
    call = call_of(row, torch.device("cuda", 0))
    names = {" ".join(str(x) for x in asdict(one).values()): one for one in launches(row)}
    return tuned((name, partial(kernel_of, row, one, call)) for name, one in names.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = row_parser("forward", __doc__, "launches of the prefill kernel")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available():
        print("forward: needs a GPU, torch sees none", file=sys.stderr)
        return 2
    begun = time.monotonic()
    rows = chosen(arguments.rows, ROWS)
    indices = [ROWS.index(row) for row in rows]
    found: dict[str, Any] = {"benchmark": "forward", "unit": "us", "rows": {}}
    errors: dict[int, Any] = {} if arguments.time else prepare(indices, arguments.tune)
    print(f"compiled and compared after {time.monotonic() - begun:.0f} s", flush=True)
    if arguments.check:
        found["rows"] = {ROWS[i].name: checks for i, checks in errors.items()}
        print(*(f"{name}: {checks}" for name, checks in found["rows"].items()), sep="\n")
        write(arguments.json, "forward", argv, torch.device("cuda"), found)
        return 0
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    try:
        for row in in_time(rows, begun, arguments.seconds):
            with torch.inference_mode():
                if arguments.tune:
                    found["rows"][row.name] = tune(row)
                    print(f"{row.name:24} {list(found['rows'][row.name].items())[:5]}", flush=True)
                    continue
                samples = sampled(contenders(row, torch.device("cuda")), flush, arguments.rounds)
            times, checks = medians(samples), errors.get(ROWS.index(row), {})
            found["rows"][row.name] = {"times": times, "quarters": quarters(samples), "checks": checks}
            report(row.name, times, checks)
    finally:  # what there is, should a row fail
        write(arguments.json, "forward", argv, torch.device("cuda"), found)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


def prepare(indices: Iterable[int], tuning: bool) -> dict[int, Any]:
    """Compiles, in several processes; returns the errors by row."""
    indices = list(indices)
    with ProcessPoolExecutor(max(1, min(12, (os.cpu_count() or 1) - 1)), get_context("spawn")) as pool:
        if tuning:
            list(pool.map(compile_launch, [(i, one) for i in indices for one in launches(ROWS[i])]))
            return {}
        return dict(zip(indices, pool.map(error_of, indices), strict=True))


if __name__ == "__main__":
    end(main)
