"""A model both ways, on torch's own function and on the drop-in: how it is run, compared and timed."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
import fastattn.drop_in
from fastattn.bench.timing import quartiles, synchronize

from .drop_in_models import Inputs, Made
from .settling import settle

WAYS = ("torch", "fastattn")
LARGER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
_NAME = "scaled_dot_product_attention"
_Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Plan:
    """How long it is measured."""

    rounds: int
    seconds: float  #: that one way runs for in a round, or one run where that takes longer


@dataclass
class Run:
    """A model that is ready to run in one dtype, without gradients or a training step."""

    made: Made
    inputs: Inputs
    training: bool
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.made.model.parameters()).dtype

    def __call__(self, inputs: Inputs | None = None) -> Tensor:
        """The output, or the loss of a step. Waits for nothing."""
        inputs = self.inputs if inputs is None else inputs
        if self.optimizer is None:
            with torch.no_grad():
                return self.made.call(self.made.model, inputs)
        loss = self.loss(inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def loss(self, inputs: Inputs) -> Tensor:
        """Of the outputs' distance to a ramp; for tokens, of the next one."""
        out = self.made.call(self.made.model, inputs)
        if "tokens" in inputs:
            return F.cross_entropy(out[:, :-1].flatten(0, 1), inputs["tokens"][:, 1:].flatten())
        ramp = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
        return F.mse_loss(out, ramp.expand_as(out))


def ready(made: Made, dtype: torch.dtype, training: bool, device: torch.device) -> Run:
    """The model in a dtype, with an optimizer that does all of its work and changes nothing."""
    made.model.to(dtype).train(training)
    run = Run(made, cast(made.inputs, dtype), training, device)
    if training:
        fused = True if device.type == "cuda" else None
        run.optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.0, fused=fused)
    return run


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating tensors in this dtype."""
    return {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in inputs.items()}


def way(name: str) -> AbstractContextManager[Any]:
    """What has to be in force for a run on torch's function or on the drop-in."""
    if name == "fastattn":
        return fastattn.drop_in.patched()
    if name == "torch-cudnn":
        order = [
            SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
        ]  # fmt: skip
        return sdpa_kernel(order, set_priority=True)
    return nullcontext()


def compared(run: Run, plan: Plan) -> dict[str, Any]:
    """Errors, what serves, and times."""
    found: dict[str, Any] = errors(run)
    found["torch_kernels"] = chosen_by_torch(run)
    found |= settled(run)
    return found | times(run, plan)


# Right or wrong.


def errors(run: Run) -> dict[str, Any]:
    """Relative errors of both ways, of the output or of all gradients, against torch's function in the larger dtype.

    Wrong is what errs by half more than torch does itself.
    """
    dtype, model = run.dtype, run.made.model
    model.to(LARGER[dtype])  # and back, which is exact
    try:
        truth = _results(run, cast(run.inputs, LARGER[dtype]))
    finally:
        model.to(dtype)
    by_way: dict[str, dict[str, float]] = {}
    for name in WAYS:
        with way(name):
            got = _results(run, run.inputs)
        by_way[name] = {what: _error(got[what], truth[what]) for what in truth}
    found = {what: {name: by_way[name][what] for name in WAYS} for what in truth}
    least = 1e-5 if dtype == torch.float32 else 1e-4
    right = all(x["fastattn"] <= 1.5 * x["torch"] + least for x in found.values())
    return {"errors": found, "right": right}


def _results(run: Run, inputs: Inputs) -> dict[str, list[Tensor]]:
    model = run.made.model
    if not run.training:
        with torch.no_grad():
            return {"output": [run.made.call(model, inputs)]}
    loss = run.loss(inputs)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return {"gradients": gradients}


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The norm of the differences over that of what is wanted; NaN counts as infinite."""
    if len(got) != len(want):
        return 1e9
    off = sum(float((a.to(b.dtype) - b).square().sum(dtype=torch.float64)) for a, b in zip(got, want))
    whole = sum(float(b.square().sum(dtype=torch.float64)) for b in want)
    found = math.sqrt(off / whole) if whole else math.inf
    return found if math.isfinite(found) else 1e9  # JSON has no infinity


# Who serves.


@contextmanager
def counting() -> Iterator[dict[str, dict[str, int]]]:
    """Of what fastattn serves, and hands to torch, within the block."""
    before = fastattn.stats()
    found: dict[str, dict[str, int]] = {}
    yield found
    after = fastattn.stats()
    for what in ("calls", "handed_to_torch"):
        counts = {key: n - before[what].get(key, 0) for key, n in after[what].items()}
        found[what] = {key: n for key, n in counts.items() if n}


def chosen_by_torch(run: Run) -> dict[str, int]:
    """The kernels that torch's own function chooses for the calls of one run."""
    choice = getattr(torch, "_fused_sdp_choice", None)
    own, found = getattr(F, _NAME), Counter[str]()

    def asked(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        if choice is None:
            name = "unknown"
        else:
            try:
                name = SDPBackend(choice(q, k, v, *args, **options)).name.lower().removesuffix("_attention")
            except (RuntimeError, TypeError, ValueError):
                name = "unknown"
        found[name] += 1
        return own(q, k, v, *args, **options)

    with mock.patch.object(F, _NAME, asked):
        run()
    return dict(found)


def settled(run: Run) -> dict[str, dict[str, int]]:
    """What serves a run of the drop-in, once no kernel is compiled and no plan built for it any more."""
    with way("fastattn"):
        settle(run, run.device)
        with counting() as found:
            run()
    return found


# Times.


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected within the block: what the patch leaves behind is not to be found in someone's time."""
    there = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if there:
            gc.enable()


@uncollected()
def times(run: Run, plan: Plan) -> dict[str, Any]:
    """Milliseconds of a run each way, in turns.

    The first run of a turn does not count: nobody goes from one way to the other and back, and a CPU whose caches hold
    the other way's code takes tenths of a millisecond more for each layer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    count = 1
    for turn in range(plan.rounds + 1):
        for name in WAYS if turn % 2 else WAYS[::-1]:
            with way(name):
                _sample(run, 1)
                one = _sample(run, count if turn else 2)
            if turn:
                seconds[name].append(one)
            else:
                count = max(count, min(100, round(plan.seconds / one)))
    ratios = [mine / theirs for mine, theirs in zip(seconds["fastattn"], seconds["torch"])]
    low, high = quartiles(ratios)
    medians = {f"{name}_ms": round(statistics.median(x) * 1e3, 4) for name, x in seconds.items()}
    best = {f"{name}_best_ms": round(min(x) * 1e3, 4) for name, x in seconds.items()}
    return {
        **medians, **best, "rounds": plan.rounds, "runs_a_round": count,
        "ratio": round(statistics.median(ratios), 4), "quartiles": [round(low, 4), round(high, 4)],
    }  # fmt: skip


def _sample(run: Run, count: int, inputs: Inputs | None = None) -> float:
    """Seconds of one run."""
    synchronize(run.device)
    begin = time.perf_counter()
    for _ in range(count):
        run(inputs)
    synchronize(run.device)
    return (time.perf_counter() - begin) / count


@uncollected()
def fresh(run: Run, sizes: Sequence[Inputs], cudnn: bool) -> dict[str, Any]:
    """Inputs whose size nobody has met: milliseconds of the first run and of the second.

    First the rest of the model meets the size, with a kernel of torch's that none of the ways is asked to use: its
    matrix products and the allocator are to be ready for all alike. cudnn: whether "torch-cudnn" runs, too; not where
    torch chooses its kernel anyway, of whose plans the first of the two would leave none to build for the second.
    """
    ways = [*WAYS, "torch-cudnn"] if cudnn else [*WAYS]
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    before = fastattn.stats()["plans"]["builds"]
    for i, size in enumerate(sizes):
        inputs = cast(size, run.dtype)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            _sample(run, 2, inputs)
        for name in (*ways[i % len(ways) :], *ways[: i % len(ways)]):
            with way(name):
                firsts[name].append(_sample(run, 1, inputs) * 1e3)
                seconds[name].append(_sample(run, 1, inputs) * 1e3)
    ratios = [mine / theirs for mine, theirs in zip(firsts["fastattn"], firsts["torch"])]
    return {
        "sizes": len(sizes),
        "times": {
            name: {
                "first_ms": round(statistics.median(firsts[name]), 3),
                "worst_first_ms": round(max(firsts[name]), 3),
                "second_ms": round(statistics.median(seconds[name]), 3),
                "firsts_ms": [round(x, 3) for x in firsts[name]],
                "seconds_ms": [round(x, 3) for x in seconds[name]],
            }
            for name in ways
        },
        "ratio": round(statistics.median(ratios), 4),
        "plans_built_while_a_caller_waited": fastattn.stats()["plans"]["builds"] - before,
    }
