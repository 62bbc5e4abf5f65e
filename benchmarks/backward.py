"""The backward of attention calls by our kernels, beside torch's: one process, in turns; needs a GPU.

    python -m benchmarks.backward [ROW ...] [--json FILE] [--tune] [--seconds N] [--check | --time] [--flex]

ROW: words of the names of rows; all rows without any. First every kernel of ours is compiled and compared with the
float64 reference ("error": the greatest norm of a gradient's difference over norm). Then times: medians in microseconds
of GPU work, captured in CUDA graphs, "cold" with the L2 cache flushed before each call, "hot" over many calls in a row.
"NAME" is the backward alone, "NAME forward" the forward before it. --tune: tiles of the portable kernel's passes
instead, hot: of the rows named, without any of one row of each kind (see `backward_tune.py`). --flex: torch's compiled
flex attention too, forward and backward as one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.bench import output
from fastattn.bench.peers import forget_compiled
from fastattn.bench.timing import text_of
from fastattn.bench.users import contenders as users
from fastattn.bench.users.calls import Row
from fastattn.bench.users.rows import chosen
from fastattn.call import Call, Problem
from fastattn.dispatch.registry import backend

from .backward_calls import ROWS, Own
from .backward_tune import ROWS as TUNED
from .backward_tune import tune
from .command import end, write
from .row_commands import call_of, in_time, report, row_parser
from .torchs_backward import Run, torchs
from .turns import FLUSHED, measure

KERNELS = {
    "portable": "fastattn.backends.triton.backward.launch",
    "hopper": "fastattn.backends.triton.hopper_backward.launch",
}
_MOST_SCORES = 3 << 30  #: of a row that is compared: float64 takes its time


def upstream(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the log-sum-exp and a gradient of the output."""
    plain = call._replace(grads="", return_lse=True)
    p = Problem.of(plain)
    server = next(x for x in map(backend, ("prefill", "reference")) if not x.reasons(p))
    out, lse = server.bind(p, plain).forward(plain)
    assert lse is not None
    return out, lse, torch.randn_like(out)


def ours(call: Call) -> dict[str, Any]:
    """The bound kernels that take a call, by name."""
    p = Problem.of(call)
    found: dict[str, Any] = {}
    for name, module in KERNELS.items():
        try:
            launch = import_module(module)
        except ImportError:
            continue
        if not launch.reasons(p):
            found[name] = launch.bind(p, call)
    if not backend("cudnn").reasons(p):
        found["cudnn"] = backend("cudnn").bind(p, call)
    return found


def contenders(call: Call) -> dict[str, Run]:
    """Calls by the name of what serves them."""
    out, lse, grad_out = upstream(call)
    found: dict[str, Run] = {}
    for name, kernel in ours(call).items():
        if name == "cudnn":  # its backward reads its forward's log-sum-exp
            own = kernel.forward(call)
            found["cudnn"] = partial(kernel.backward, call, *own, grad_out, None)
            found["cudnn forward"] = partial(kernel.forward, call)
        else:
            found[name] = partial(kernel.backward, call, out, lse, grad_out, None)
    plain = call._replace(grads="", return_lse=True)
    if not backend("prefill").reasons(Problem.of(plain)):
        found["prefill forward"] = partial(backend("prefill").bind(Problem.of(plain), plain).forward, plain)
    for name, (forward, backward) in torchs(("cudnn", "flash", "efficient"), call, grad_out).items():
        found[f"torch {name}"], found[f"torch {name} forward"] = backward, forward
    return found


def flex(row: Row, device: torch.device) -> dict[str, Run]:
    """Forward and backward by flex attention, of the rows that it has words for."""
    if isinstance(row, Own):
        return {}
    forget_compiled()
    return {"flex both": users.bind(users.FLEX, row, row.tensors(device)[0])}


def errors_of(call: Call) -> dict[str, Any]:
    """The greatest relative error of a gradient, by kernel."""
    p = Problem.of(call)
    out, lse, grad_out = upstream(call)
    want = None
    if p.batch * p.q_heads * p.q_len * p.kv_len <= _MOST_SCORES:
        wide = call._replace(q=call.q.double(), k=call.k.double(), v=call.v.double())
        want = reference.backward(replace(p, dtype=torch.float64), wide, grad_out.double(), None)
    found: dict[str, Any] = {}
    for name, kernel in ours(call).items():
        start = time.perf_counter()
        try:
            own = kernel.forward(call) if name == "cudnn" else (out, lse)
            got = kernel.backward(call, *own, grad_out, None)
            torch.cuda.synchronize()
            found[name] = {"first": round(time.perf_counter() - start, 2)}
            if want is not None:
                pairs = [
                    (x.double(), y.double()) for x, y in zip(got, want, strict=True) if x is not None and y is not None
                ]
                found[name]["error"] = max(float(f"{(x - y).norm() / y.norm():.2e}") for x, y in pairs)
        except Exception as failure:
            found[name] = {"failed": text_of(failure)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = row_parser("backward", __doc__, "tiles of the portable kernel's passes")
    parser.add_argument("--flex", action="store_true", help="compiled flex attention too")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available():
        print("backward: needs a GPU, torch sees none", file=sys.stderr)
        return 2
    begun, device = time.monotonic(), torch.device("cuda", 0)
    found: dict[str, Any] = {"benchmark": "backward", "unit": "us", "rows": {}}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    try:
        rows = chosen(arguments.rows, ROWS)
        if arguments.tune and not arguments.rows:
            rows = [row for row in rows if row.name in TUNED]
        for row in in_time(rows, begun, arguments.seconds):
            torch.manual_seed(0)
            with torch.no_grad():
                call = call_of(row, device)
                if arguments.tune:
                    passes = tune(call, upstream(call))
                    found["rows"][row.name] = {name: asdict(one) for name, one in passes.items()}
                    for one in passes.values():
                        print(f"{row.name:20} {one.line()}", flush=True)
                    continue
                checks = {} if arguments.time else errors_of(call)
                runs = {} if arguments.check else contenders(call)
            if arguments.flex and not arguments.check:
                runs |= flex(row, device)
            times = measure(runs, flush, arguments.rounds)
            found["rows"][row.name] = {"times": times, "checks": checks}
            report(row.name, times, checks)
    finally:  # what there is, should a row fail
        write(arguments.json, "backward", argv, device, found)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    end(main)
