"""What a call costs the host: `python -m benchmarks.host [--json FILE] [--quick] [--device cpu]`.

Microseconds of host time a call, without waiting for the GPU: torch's op, ours, ours over a backend that computes
nothing, the launches of our call by themselves, and what a link of autograd costs that does nothing. All in one
process, in turns: in each round each is called many times in a row; a figure is the best round's, as whatever else the
machine does only adds to it. On a CPU torch's kernels compute meanwhile, so that only what computes nothing tells
something; shapes are tiny there.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
from fastattn.bench.timing import synchronize
from fastattn.lm.loading.device import pick_device

from .command import end, parser_of, write
from .null_backend import null_backend

ROUNDS, CALLS = 15, 50
QUICK = 3, 10

Run = Callable[[], Any]


@dataclass(frozen=True)
class Inputs:
    """Of one case. `leaves`: q, k and v as they are differentiated."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    options: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class HostCase:
    """A kind of call."""

    make: Callable[[torch.device], Inputs]
    ours: Callable[..., Any]
    torchs: Callable[..., Any] | None  #: None: torch has nothing like it
    plans: str = "dynamic"  #: FASTATTN_PLANS
    differentiated: bool = True


def _sizes(device: torch.device) -> tuple[int, int, int, int]:
    """Batch, heads, length, head dim."""
    return (2, 8, 128, 64) if device.type == "cuda" else (2, 2, 8, 8)


def _token_major(device: torch.device, length: int | None = None) -> Tensor:
    batch, heads, own, dim = _sizes(device)
    made = torch.randn(batch, length or own, heads, dim, device=device, dtype=torch.bfloat16)
    return made.transpose(1, 2)


def _square(device: torch.device, **options: Any) -> Inputs:
    q, k, v, grad_out = (_token_major(device) for _ in range(4))
    return Inputs(q, k, v, grad_out, options)


def _decode(device: torch.device) -> Inputs:
    q, grad_out = (_token_major(device, 1) for _ in range(2))
    k, v = (_token_major(device).contiguous() for _ in range(2))
    return Inputs(q, k, v, grad_out, {})


def _lengths(device: torch.device) -> Inputs:
    batch, _, length, _ = _sizes(device)
    return _square(device, kv_lengths=torch.linspace(length // 2, length, batch, device=device).int())


def _masked(device: torch.device) -> Inputs:
    _, _, length, _ = _sizes(device)
    return _square(device, mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril())


def _packed(device: torch.device) -> Inputs:
    batch, heads, length, dim = _sizes(device)
    tokens = batch * length
    q, k, v, grad_out = (torch.randn(tokens, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(4))
    cu = torch.tensor([0, length // 3, tokens], dtype=torch.int32, device=device)
    return Inputs(q, k, v, grad_out, {"cu": cu})


def _ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, **options)


def _ours_causal(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, mask="causal")


def _ours_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Any:
    return fastattn.varlen_attention(q, k, v, cu, cu, causal=True)


def _torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def _torchs_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def _torchs_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


CASES = {
    "dynamic plan": HostCase(_square, _ours_causal, _torchs_causal),
    "static plan": HostCase(_square, _ours_causal, _torchs_causal, plans="static"),
    "decode": HostCase(_decode, _ours, _torchs, differentiated=False),
    "varlen": HostCase(_packed, _ours_packed, None),
    "lengths": HostCase(_lengths, _ours, None),
    "dense mask": HostCase(_masked, _ours, _torchs_masked),
}
#: In which a forward is timed. "grad": gradients are on, and no input wants one.
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode
}  # fmt: skip


class _Three(torch.autograd.Function):
    """The least that a link can do: three arguments, three saved tensors, three gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple([torch.empty_like(x) for x in ctx.saved_tensors])


class _Eighteen(torch.autograd.Function):
    """The same with 18 arguments and 12 saved tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, *(q,) * 9)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *[torch.empty_like(x) for x in ctx.saved_tensors[:3]], *(None,) * 15


def _forward(function: Callable[..., Any], x: Inputs) -> Run:
    return partial(function, *x.tensors, **x.options)


def _both(function: Callable[..., Any], x: Inputs) -> Run:
    """Forward and backward."""
    leaves = [y.detach().requires_grad_() for y in x.tensors]

    def run() -> Any:
        return torch.autograd.grad(function(*leaves, **x.options), leaves, x.grad_out)

    return run


@contextmanager
def _recording(launches: list[Run]) -> Iterator[None]:
    """Whatever our kernels launch within the block, as calls that launch it again."""
    from fastattn.backends.cudnn.plan import Plan
    from fastattn.backends.triton.cuda_driver import Function
    from fastattn.backends.triton.launcher import Launcher

    with ExitStack() as stack:
        for owner, name in ((Plan, "execute"), (Launcher, "__call__"), (Function, "launch")):
            method = getattr(owner, name)

            def record(*given: Any, method: Callable[..., Any] = method) -> Any:
                launches.append(partial(method, *given))
                return method(*given)

            stack.enter_context(mock.patch.object(owner, name, record))
        yield


def _launches(run: Run) -> Run | None:
    """The launches of a call by themselves; None where there are none."""
    launches: list[Run] = []
    run()
    with _recording(launches):
        run()

    def again() -> None:
        for launch in launches:
            launch()

    return again if launches else None


@contextmanager
def _plans(policy: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, FASTATTN_PLANS=policy):
        yield


@dataclass(frozen=True)
class Contender:
    """What is timed, and what has to be in force meanwhile."""

    case: str
    implementation: str
    what: str  #: "forward" or "forward and backward"
    mode: str
    run: Run
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def _contenders(name: str, device: torch.device, compiler: str | None) -> Iterator[Contender]:
    """Of one case. compiler: of torch.compile; None: nothing is compiled."""
    case = CASES[name]
    x = case.make(device)
    functions: dict[str, tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]]]] = {
        "fastattn": (case.ours, partial(_plans, case.plans))
    }
    if case.torchs is not None:
        kernels: dict[str, Callable[[], AbstractContextManager[Any]]] = {"torch": nullcontext}
        if device.type == "cuda":
            kernels = {
                "torch-cudnn": partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
                "torch-flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
            }
        functions |= {kernel: (case.torchs, context) for kernel, context in kernels.items()}
    for implementation, (function, context) in functions.items():
        for mode, entered in MODES.items():
            yield Contender(
                name, implementation, "forward", mode, _forward(function, x), partial(_and, entered, context)
            )
        if case.differentiated:
            yield Contender(name, implementation, "forward and backward", "grad", _both(function, x), context)
        if compiler is not None:
            compiled = torch.compile(function, backend=compiler, fullgraph=True)
            entered = partial(_and, torch.no_grad, context)
            yield Contender(name, implementation, "forward", "compiled", _forward(compiled, x), entered)
            if case.differentiated:
                run = _both(compiled, x)
                yield Contender(name, implementation, "forward and backward", "compiled", run, context)
    if device.type == "cuda":
        runs = {"forward": _forward(case.ours, x)}
        if case.differentiated:
            runs["forward and backward"] = _both(case.ours, x)
        for what, run in runs.items():
            with _plans(case.plans):
                launches = _launches(run)
            if launches is not None:
                yield Contender(name, "its launches", what, "grad", launches)


def _nothing(name: str, device: torch.device) -> Iterator[Contender]:
    """Our op over the backend that computes nothing: to be timed within `null_backend`."""
    case = CASES[name]
    x = case.make(device)
    for mode, entered in MODES.items():
        yield Contender(name, "fastattn, nothing computed", "forward", mode, _forward(case.ours, x), entered)
    if case.differentiated:
        run = _both(case.ours, x)
        yield Contender(name, "fastattn, nothing computed", "forward and backward", "grad", run)


def _floors(device: torch.device) -> Iterator[Contender]:
    x = _square(device)
    rest = (None,) * 15
    for name, function in {
        "a Function of 3 arguments": _Three.apply,
        "a Function of 18 arguments": lambda q, k, v: _Eighteen.apply(q, k, v, *rest),
    }.items():
        yield Contender("floor", name, "forward and backward", "grad", _both(function, x))
    yield Contender("floor", "an output", "forward", "grad", partial(torch.empty_like, x.q))


@contextmanager
def _and(*contexts: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def measure(contenders: Sequence[Contender], device: torch.device, rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row for each, in turns; with "error" instead of figures where one raises."""
    samples: dict[int, list[float]] = {i: [] for i in range(len(contenders))}
    errors: dict[int, str] = {}
    for turn in range(rounds + 1):
        for i, contender in enumerate(contenders):
            if i in errors:
                continue
            try:
                us = _sample(contender, device, calls if turn else 3)
            except Exception as error:
                errors[i] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                continue
            if turn:
                samples[i].append(us)
    rows: list[dict[str, Any]] = []
    for i, x in enumerate(contenders):
        row: dict[str, Any] = {"case": x.case, "implementation": x.implementation, "what": x.what, "mode": x.mode}
        if i in errors:
            row["error"] = errors[i]
        else:
            row |= {"us": round(min(samples[i]), 2), "median_us": round(statistics.median(samples[i]), 2)}
        rows.append(row)
    return rows


def _sample(contender: Contender, device: torch.device, calls: int) -> float:
    with contender.context():
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            contender.run()
        seconds = time.perf_counter() - begin
        synchronize(device)
    return seconds * 1e6 / calls


def line_of(row: dict[str, Any]) -> str:
    """A row as text."""
    value = row["error"] if "error" in row else f"{row['us']:8.1f} us, median {row['median_us']:.1f}"
    return f"{row['case']:<13} {row['what']:<21} {row['mode']:<10} {row['implementation']:<28} {value}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 where fastattn failed in a row."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("host", __doc__)
    parser.add_argument("--quick", action="store_true", help="few calls of each")
    parser.add_argument("--device", help="cuda or cuda:N; cpu times tiny shapes (default: the GPU, if there is one)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be given again")
    parser.add_argument(
        "--compiler", help="backend of torch.compile; none: nothing is compiled (default: inductor on a GPU)"
    )
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    compiler = options.compiler or ("inductor" if device.type == "cuda" else "none")
    rounds, calls = QUICK if options.quick else (ROUNDS, CALLS)
    rows: list[dict[str, Any]] = []

    def add(contenders: Iterator[Contender]) -> None:
        found = measure(list(contenders), device, rounds, calls)
        rows.extend(found)
        for row in found:
            print(line_of(row))

    add(_floors(device))
    for name in options.case or CASES:
        add(_contenders(name, device, None if compiler == "none" else compiler))
        with null_backend():
            add(_nothing(name, device))
    write(options.json, "host", argv, device, {"rounds": rounds, "calls": calls, "rows": rows})
    return int(any("error" in row and row["implementation"].startswith("fastattn") for row in rows))


if __name__ == "__main__":
    end(main)
