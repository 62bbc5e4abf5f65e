"""What a call costs the host: `python -m benchmarks.host [--json FILE] [--quick] [--device cpu]`.

Microseconds of host time a call, without waiting for the GPU: torch's op, ours, torch's on the drop-in, ours over a
backend that computes nothing, the launches of our call by themselves, and what a link of autograd costs that does
nothing. All in one process, in turns: in each round each is called many times in a row; a figure is the best round's,
as whatever else the machine does only adds to it. On a CPU torch's kernels compute meanwhile, so that only what
computes nothing tells something; shapes are tiny there.

Then wall time of eager forward and backward of calls as models make them, the GPU's work included, against each of
torch's kernels. "ratios" in the file are ours over torch's, with their targets: 1.0 for a forward and 1.15 for forward
and backward of torch's cuDNN call on the same inputs, 1.05 for wall time of the best of torch's kernels.
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
from torch.nn.attention import sdpa_kernel

from fastattn.bench import output
from fastattn.bench.timing import synchronize, text_of
from fastattn.lm.loading.device import pick_device

from .command import end, parser_of, write
from .host_cases import CASES, KERNELS, MODES, OURS, Eighteen, Inputs, Run, Three, both, forward, product, square
from .host_ratios import line_of_ratio, ratios
from .host_wall import wall_rows
from .null_backend import null_backend
from .settling import settle

ROUNDS, CALLS = 15, 50
QUICK = 3, 10
BUDGET = 55.0  #: seconds


@contextmanager
def _recording(launches: list[Run]) -> Iterator[None]:
    """Whatever our kernels launch within the block, as calls that launch it again."""
    from fastattn.backends.cudnn.plan import Plan
    from fastattn.backends.triton.cuda_driver import BoundLaunch
    from fastattn.backends.triton.launcher import Launcher

    launch = BoundLaunch.__call__

    def of_a_binary(self: BoundLaunch, stream: int) -> None:
        places = type(self.places)(*self.places)  # which the next call writes to

        def again() -> None:
            own, self.places = self.places, places
            launch(self, stream)
            self.places = own

        launches.append(again)
        launch(self, stream)

    with ExitStack() as stack:
        for owner, name in ((Plan, "execute"), (Launcher, "__call__")):
            method = getattr(owner, name)

            def record(*given: Any, _method: Callable[..., Any] = method, **named: Any) -> Any:
                launches.append(partial(_method, *given, **named))
                return _method(*given, **named)

            stack.enter_context(mock.patch.object(owner, name, record))
        stack.enter_context(mock.patch.object(BoundLaunch, "__call__", of_a_binary))
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


_Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contender:
    """What is timed, and what has to be in force meanwhile."""

    case: str
    implementation: str
    what: str  #: "forward" or "forward and backward"
    mode: str
    run: Run
    context: _Context = nullcontext


def _functions(name: str, device: torch.device) -> Iterator[tuple[str, Callable[..., Any], Inputs, _Context]]:
    """Who computes a case: name, function, its inputs, and what has to be in force."""
    case = CASES[name]
    x = case.make(device)
    yield "fastattn", case.ours, x, partial(_plans, case.plans)
    if case.torchs is None or (device.type == "cpu" and not case.torchs_on_a_cpu):
        return
    theirs = x.for_torch()
    if case.dropped_in is not None:
        yield "drop-in", case.dropped_in, theirs, partial(_plans, case.plans)
    yield "torch", case.torchs, theirs, nullcontext
    if device.type == "cuda" and case.dropped_in is not None:  # of torch's function alone one may choose the kernel
        for implementation, kernel in KERNELS.items():
            yield implementation, case.torchs, theirs, partial(sdpa_kernel, kernel)


def _contenders(name: str, device: torch.device) -> Iterator[Contender]:
    """Of one case, eager."""
    case = CASES[name]
    for implementation, function, x, context in _functions(name, device):
        for mode, entered in MODES.items():
            run = forward(function, x)
            yield Contender(name, implementation, "forward", mode, run, partial(_and, entered, context))
        if case.differentiated:
            yield Contender(name, implementation, "forward and backward", "grad", both(function, x), context)
        if device.type == "cuda" and implementation == "fastattn":
            yield from _bare(name, x, context)


def _bare(name: str, x: Inputs, context: _Context) -> Iterator[Contender]:
    """The launches of our call."""
    runs = {"forward": forward(CASES[name].ours, x)}
    if CASES[name].differentiated:
        runs["forward and backward"] = both(CASES[name].ours, x)
    for what, run in runs.items():
        with context():
            settle(run, x.q.device)
            launches = _launches(run)
        if launches is not None:
            yield Contender(name, "its launches", what, "grad", launches)


def _compiled(name: str, device: torch.device, compiler: str) -> Iterator[Contender]:
    """Of one case, within torch.compile."""
    for implementation, function, x, context in _functions(name, device):
        if implementation in ("torch-flash", "torch-efficient"):
            continue
        compiled = torch.compile(function, backend=compiler, fullgraph=True)
        entered = partial(_and, torch.no_grad, context)
        yield Contender(name, implementation, "forward", "compiled", forward(compiled, x), entered)
        if CASES[name].differentiated:
            yield Contender(name, implementation, "forward and backward", "compiled", both(compiled, x), context)


def _nothing(name: str, device: torch.device) -> Iterator[Contender]:
    """Our op over the backend that computes nothing: to be timed within `null_backend`."""
    case = CASES[name]
    x = case.make(device)
    for mode, entered in MODES.items():
        yield Contender(name, "fastattn, nothing computed", "forward", mode, forward(case.ours, x), entered)
    if case.differentiated:
        run = both(case.ours, x)
        yield Contender(name, "fastattn, nothing computed", "forward and backward", "grad", run)


def _floors(device: torch.device, compiler: str | None) -> Iterator[Contender]:
    """compiler: of torch.compile, for those within it alone; None: the eager ones."""
    x = square(device)
    what, rest = "forward and backward", (None,) * 15
    if compiler is not None:
        compiled = torch.compile(product, backend=compiler, fullgraph=True)
        yield Contender("floor", "one operator in C++", "forward", "compiled", forward(compiled, x), torch.no_grad)
        yield Contender("floor", "one operator in C++", what, "compiled", both(compiled, x))
        return
    for mode, entered in MODES.items():
        yield Contender("floor", "one operator in C++", "forward", mode, forward(product, x), entered)
        yield Contender("floor", "a Function of 3 arguments", "forward", mode, forward(Three.apply, x), entered)
        yield Contender("floor", "an output", "forward", mode, partial(torch.empty_like, x.q), entered)
    yield Contender("floor", "one operator in C++", what, "grad", both(product, x))
    yield Contender("floor", "a Function of 3 arguments", what, "grad", both(Three.apply, x))
    yield Contender(
        "floor", "a Function of 18 arguments", what, "grad", both(lambda q, k, v: Eighteen.apply(q, k, v, *rest), x)
    )


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
                if turn == 0 and contender.implementation in OURS:
                    with contender.context():
                        settle(contender.run, device)
                us = _sample(contender, device, calls if turn else 3)
            except torch.AcceleratorError as error:  # nothing runs in this process any more
                which = f"{contender.case}, {contender.what}, {contender.mode}, {contender.implementation}"
                raise RuntimeError(f"{which}: {text_of(error)[:200]}") from error
            except Exception as error:
                errors[i] = text_of(error)[:200]
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
    text = "what would be compiled later is left out (%(default)s)"
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=text)
    options = parser.parse_args(argv)
    output.check([options.json])
    device = pick_device(options.device)
    compiler = options.compiler or ("inductor" if device.type == "cuda" else "none")
    rounds, calls = QUICK if options.quick else (ROUNDS, CALLS)
    names = options.case or CASES
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def add(contenders: Iterator[Contender]) -> None:
        found = measure(list(contenders), device, rounds, calls)
        rows.extend(found)
        print("\n".join(line_of(row) for row in found), flush=True)

    found: list[dict[str, Any]] = []
    wall: list[dict[str, Any]] = []
    try:
        add(_floors(device, None))
        for name in names:
            add(_contenders(name, device))
            with null_backend():
                add(_nothing(name, device))
        wall = wall_rows(device, rounds, 0.02 if device.type == "cuda" else 0.0)
        if compiler != "none":
            add(_floors(device, compiler))
            for name in [name for name in names if CASES[name].compiled or options.case]:
                if time.monotonic() - begun > options.budget:
                    left_out.append(f"{name}, compiled")
                else:
                    add(_compiled(name, device, compiler))
    finally:  # what there is, should the GPU fail
        found = ratios(rows, wall)
        print("\n".join(line_of_ratio(row) for row in found))
        kept = {"rounds": rounds, "calls": calls, "rows": rows, "wall": wall, "ratios": found, "left_out": left_out}
        write(options.json, "host", argv, device, kept)
    if left_out:
        print(f"Left out, no time: {'; '.join(left_out)}")
    print(f"{time.monotonic() - begun:.0f} s")
    return int(any("error" in row and row["implementation"].startswith(OURS) for row in [*rows, *wall]))


if __name__ == "__main__":
    end(main)
