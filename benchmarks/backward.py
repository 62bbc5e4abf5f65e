"""The backward of attention calls by our kernels, beside torch's: one process, in turns; needs a GPU.

    python -m benchmarks.backward [ROW ...] [--json FILE] [--tune] [--seconds N] [--check | --time] [--flex]

ROW: words of the names of rows; all rows without any. First every kernel of ours is compiled and compared with the
float64 reference ("error": the greatest norm of a gradient's difference over norm). Then times: medians in microseconds
of GPU work, captured in CUDA graphs, "cold" with the L2 cache flushed before each call, "hot" over many calls in a row.
"NAME" is the backward alone, "NAME forward" the forward before it. --tune: many tiles of the portable kernel's passes
for each row, hot, instead. --flex: torch's compiled flex attention too, forward and backward as one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.bench import output
from fastattn.call import Call, Problem
from fastattn.dispatch.registry import backend
from fastattn.validation import Arguments, validated

from .backward_calls import ROWS, Backward
from .command import captured, end, parser_of, write
from .turns import FLUSHED, between, measure

KERNELS = {
    "portable": "fastattn.backends.triton.backward.launch",
    "hopper": "fastattn.backends.triton.hopper_backward.launch",
}
_MOST_SCORES = 3 << 30  #: of a row that is compared: float64 takes its time
#: Tiles that are tried of a pass: queries, keys, warps, stages.
TILES = [
    *product((64,), (64,), (4, 8), (1, 2, 3)),
    *product((64,), (128,), (8,), (1, 2)),
    *product((128,), (64,), (8,), (1, 2)),
    *product((32,), (64, 128), (4, 8), (1, 2, 3)),
    *product((64, 128), (32,), (4, 8), (2, 3)),
    (32, 32, 4, 2),
    (128, 128, 8, 1),
    (128, 128, 8, 2),
]
Run = Callable[[], Any]


def call_of(row: Backward, device: torch.device) -> Call:
    """The call of a row."""
    options = row.arguments(row.ours, device)
    scale = options.pop("scale", None)
    call = validated(Arguments(*row.inputs(device), **options), scale)
    return call._replace(grads=row.grads)


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


def contenders(row: Backward, call: Call) -> dict[str, Run]:
    """Calls of one row by the name of what serves them."""
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
    if row.theirs is not None:
        for name in ("cudnn", "flash", "efficient"):
            try:
                forward, backward = torchs(name, row, call, grad_out)
            except (RuntimeError, NotImplementedError) as error:
                print(f"{row.name}: torch {name}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                continue
            found[f"torch {name}"], found[f"torch {name} forward"] = backward, forward
    return found


def torchs(name: str, row: Backward, call: Call, grad_out: Tensor) -> tuple[Run, Run]:
    """The forward and the backward of one of torch's kernels."""
    q, k, v, scale, causal = call.q, call.k, call.v, call.scale, row.theirs == {"is_causal": True}
    bias, wanted = call.mask, "m" in row.grads
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -torch.inf)
        bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    aten: Any = torch.ops.aten
    if name == "efficient":
        if q.shape[1] != k.shape[1]:  # it has no groups: on keys and values that were repeated before
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        forward = partial(aten._scaled_dot_product_efficient_attention, q, k, v, bias, True, 0.0, causal, scale=scale)
        o, lse, *seeds = forward()

        def efficient() -> Any:
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad_out, q, k, v, bias, o, lse, *seeds, 0.0, [True, True, True, wanted], causal, scale=scale
            )
            return grads[3].sum_to_size(call.mask.shape) if wanted and call.mask is not None else grads

        efficient()
        return forward, efficient
    if wanted or (name == "flash" and bias is not None):
        raise NotImplementedError("takes no such mask")
    if name == "flash":
        forward = partial(aten._scaled_dot_product_flash_attention, q, k, v, 0.0, causal, False, scale=scale)
        o, lse, cq, ck, mq, mk, seed, offset, _ = forward()
        backward = partial(
            aten._scaled_dot_product_flash_attention_backward,
            grad_out, q, k, v, o, lse, cq, ck, mq, mk, 0.0, causal, seed, offset, scale=scale,
        )  # fmt: skip
    else:
        forward = partial(
            aten._scaled_dot_product_cudnn_attention, q, k, v, bias, True, 0.0, causal, False, scale=scale
        )
        o, lse, cq, ck, mq, mk, seed, offset, _ = forward()
        backward = partial(
            aten._scaled_dot_product_cudnn_attention_backward,
            grad_out, q, k, v, o, lse, seed, offset, bias, cq, ck, mq, mk, 0.0, causal, scale=scale,
        )  # fmt: skip
    backward()
    return forward, backward


def flex(row: Backward, call: Call) -> dict[str, Run]:
    """Forward and backward by flex attention, of the rows that it is compared in."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v))
    score: Any = None
    if row.name.startswith("ALiBi"):
        slopes = 2.0 ** (-8.0 * torch.arange(1, q.shape[1] + 1, device=q.device) / q.shape[1])

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s - slopes[h] * (i - j)

    elif call.softcap:

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return call.softcap * torch.tanh(s / call.softcap)

    elif not row.name.startswith(("causal", "softcap", "full")):
        return {}
    hidden = None
    if not row.name.startswith("full"):
        hidden = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grad_out = torch.randn_like(q)

    def both() -> Any:
        out = compiled(q, k, v, score, hidden, call.scale, q.shape[1] != k.shape[1])
        return torch.autograd.grad(out, (q, k, v), grad_out)

    return {"flex both": both}


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
            found[name] = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"}
    return found


def tune(call: Call) -> dict[str, dict[str, float]]:
    """Hot microseconds of each tile of each pass, the quickest first, the other passes as they are listed."""
    from fastattn.backends.triton.backward import backward, launch_config
    from fastattn.backends.triton.limits import usual_shared_memory

    p, (out, lse, grad_out) = Problem.of(call), upstream(call)
    listed, limit = launch_config.choose(p), usual_shared_memory(p.capability)
    found: dict[str, dict[str, float]] = {}
    passes = ["keys", "queries"] if not launch_config.masked_rows(p) else ["keys and queries"]
    for name in [*passes, *(["bias"] if "m" in p.grads else [])]:
        own = found[name] = {}
        for tile in (launch_config.Tile(*numbers) for numbers in TILES):
            if launch_config.shared(p, tile) > limit:
                continue
            label = " ".join(str(x) for x in asdict(tile).values())
            try:
                one = replace(listed, **dict.fromkeys(name.split(" and "), tile))
                kernel = backward.bind(p, call, one)
                graph = captured(partial(kernel.backward, call, out, lse, grad_out, None), 2)
                times = max(1, min(20, int(2000 / between(graph, 2))))
                own[label] = round(min(between(graph, times) for _ in range(3)), 1)
            except Exception as failure:
                print(f"{label}: {str(failure).splitlines()[0][:120]}", file=sys.stderr)
        found[name] = dict(sorted(own.items(), key=lambda x: x[1]))
    return found


def line_of(name: str, row: dict[str, dict[str, float]], errors: dict[str, Any]) -> str:
    """A row of the table that is printed: cold/hot, and the error of ours."""
    cells = []
    for who, times in row.items():
        error = errors.get(who, {}).get("error")
        figures = "/".join(f"{times[what]:.0f}" for what in ("cold", "hot"))
        cells.append(f"{who} {figures}" + ("" if error is None else f" ({error:.0e})"))
    return f"{name:24} " + "  ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("backward", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--tune", action="store_true", help="tiles of the portable kernel's passes")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time (default: 7)")
    parser.add_argument("--check", action="store_true", help="compile and compare alone")
    parser.add_argument("--time", action="store_true", help="without comparing")
    parser.add_argument("--flex", action="store_true", help="compiled flex attention too")
    parser.add_argument("--seconds", type=float, default=1e9, help="rows that would begin later are left out")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available():
        print("backward: needs a GPU, torch sees none", file=sys.stderr)
        return 2
    begun, device = time.monotonic(), torch.device("cuda", 0)
    found: dict[str, Any] = {"benchmark": "backward", "unit": "us", "rows": {}}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    try:
        for index, row in enumerate(ROWS):
            if arguments.rows and not any(word in row.name for word in arguments.rows):
                continue
            if time.monotonic() - begun > arguments.seconds:
                print(f"{row.name:24} left out: no time")
                continue
            torch.manual_seed(index)
            with torch.no_grad():
                call = call_of(row, device)
                if arguments.tune:
                    found["rows"][row.name] = tune(call)
                    for name, times in found["rows"][row.name].items():
                        print(f"{row.name:24} {name}: {list(times.items())[:5]}", flush=True)
                    continue
                checks = {} if arguments.time else errors_of(call)
                runs = {} if arguments.check else contenders(row, call)
            if arguments.flex and not arguments.check:
                runs |= flex(row, call)
            times = measure(runs, flush, arguments.rounds)
            found["rows"][row.name] = {"times": times, "checks": checks}
            print(line_of(row.name, times, checks) if times else f"{row.name:24} {checks}", flush=True)
            failed = {name: x["failed"] for name, x in checks.items() if "failed" in x}
            if failed:
                print(f"{'':24} {failed}")
    finally:  # what there is, should a row fail
        write(arguments.json, "backward", argv, device, found)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    end(main)
