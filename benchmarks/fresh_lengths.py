"""Of `benchmarks.plans` the section "fresh lengths": calls whose lengths no earlier call had.

Whatever a call has to build for its lengths, its caller waits for: the worst call of a row says how long.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from fastattn import stats
from fastattn.bench import check as checks
from fastattn.bench import timing
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS
from fastattn.bench.inputs import DTYPE, Inputs, make_inputs, with_gradients
from fastattn.bench.runner import Figures, Row, Runner
from fastattn.bench.timing import spread
from fastattn.warming.run import warmup

CHECKED = 25  #: of a row's calls, compared with the reference
LEAST_CHECKED = 16  #: of fewer keys the gradients of q and k cancel, of one key to 0: no measure for an error
HEADS, KV_HEADS, DIM = 8, 2, 128
PADDED = 4  #: sequences in a batch with padding
METHOD = (
    "FASTATTN_PLANS=dynamic; each call once, synchronized before and after, its mask made before. warm: what had been "
    "built or loaded ahead: for the first two rows by one call of the largest length; for packed batches by "
    "fastattn.warmup (phases packed and training) for every power of two of sequences from 16 and of tokens from 1024; "
    "for chunks by fastattn.warmup (phases chunked and decode: few queries go to a Triton kernel, which is compiled at "
    "first use for each size of its tile) and one call of the largest length. builds and disk_loads: what the fresh "
    "calls did, while the caller waited"
)

ours = IMPLEMENTATIONS["fastattn-dynamic"]


def rows(runner: Runner) -> Iterator[Figures]:
    """The section's rows."""
    measures: dict[str, Callable[..., Row]] = {
        "forward and backward": partial(_steps, lengths),
        "left-padded batches": partial(_steps, padded_batches),
        "packed batches": _packed,
        "chunks over a cache": _chunks,
    }
    for label, measure in measures.items():
        yield Figures("fresh lengths", label, partial(measure, runner, random.Random(runner.seed)))


def _batch(length: int, size: int = 1, **more: tuple[int, ...]) -> Case:
    """A call of a training step, as many queries as keys."""
    return Case(length, length, size, HEADS, KV_HEADS, DIM, **more)  # type: ignore[arg-type]


def lengths(runner: Runner, rng: random.Random) -> list[Case]:
    """Causal calls; the first is the longest."""
    longest, count = runner.pick((8192, 200), (8192, 20), (64, 3))
    return [_batch(n) for n in (longest, *rng.sample(range(1, longest + 1), count))]


def padded_batches(runner: Runner, rng: random.Random) -> list[Case]:
    """Left-padded batches; the first is the longest."""
    least, longest, count = runner.pick((64, 2048, 50), (64, 2048, 10), (16, 64, 3))
    fresh = (longest, *(rng.randint(least, longest) for _ in range(count)))
    return [_batch(n, PADDED, padding=tuple(rng.randrange(n) for _ in range(PADDED))) for n in fresh]


def packed_batches(least: int, most: int, sequences: int, count: int, rng: random.Random) -> list[Case]:
    """Sequences packed side by side."""

    def batch(tokens: int) -> Case:
        bounds = [0, *sorted(rng.sample(range(1, tokens), rng.randint(2, sequences) - 1)), tokens]
        return _batch(tokens, packed=tuple(b - a for a, b in pairwise(bounds)))

    return [batch(rng.randint(least, most)) for _ in range(count)]


def _packed(runner: Runner, rng: random.Random) -> Row:
    least, most, sequences, count = runner.pick((512, 8192, 60, 50), (512, 8192, 60, 10), (32, 64, 6, 3))
    fresh = packed_batches(least, most, sequences, count, rng)
    train = partial(_train, runner, torch.Generator(runner.device).manual_seed(runner.seed))
    return _measured(rng, fresh, partial(warm_up_packed, runner, most, sequences), train)


def warm_up_packed(runner: Runner, tokens: int, sequences: int) -> None:
    """Training on up to that many packed tokens and sequences: plans know both by their power of two, not the batch.

    warmup packs two sequences into each batch entry, so it takes half as many entries as there are to be sequences.
    """
    entries = 8
    while True:
        warm_up(runner, ("packed", "training"), "token_major", entries, tokens // entries)
        if 2 * entries >= sequences:
            return
        entries *= 2


def warm_up(runner: Runner, phases: tuple[str, ...], layout: str, batch: int, longest: int) -> None:
    """`fastattn.warmup` for this section's heads."""
    kind = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": DTYPE, "device": runner.device}
    warmup(**kind, batch_sizes=(batch,), max_length=longest, phases=phases, layouts=(layout,), progress=False)  # type: ignore[arg-type]


def _steps(cases: Callable[[Runner, random.Random], list[Case]], runner: Runner, rng: random.Random) -> Row:
    """Forward and backward; the first of the cases warms up."""
    first, *fresh = cases(runner, rng)
    generators = [torch.Generator(runner.device).manual_seed(runner.seed) for _ in range(2)]
    ahead, train = (partial(_train, runner, generator) for generator in generators)
    return _measured(rng, fresh, partial(ahead, first, False), train)


Done = tuple[tuple[float, ...], tuple[float, ...]]  #: milliseconds, and the relative errors if they were checked


def _measured(
    rng: random.Random,
    fresh: Sequence[Case],
    warm: Callable[[], object],
    run: Callable[[Case, bool], Done],
    gradients: bool = True,
) -> Row:
    """Calls one after another, after a warm-up. run: takes a case, and whether to check it."""
    fit = [i for i, case in enumerate(fresh) if case.kv_len >= LEAST_CHECKED or not gradients]
    checked = set(rng.sample(fit, min(CHECKED, len(fit))))
    with ours.active(gradients):
        counts = _PlanCounts()
        warm()
        counts.warm()
        done = [run(case, i in checked) for i, case in enumerate(fresh)]
    figures = {"lengths": len(fresh), **counts.found()}
    for name, times in zip(("forward", "backward"), zip(*(times for times, _ in done), strict=True)):
        figures |= {f"{name}_{key}": value for key, value in spread(times).items()}
    return with_errors(figures, [errors for _, errors in done])


def _train(runner: Runner, generator: torch.Generator, case: Case, check: bool) -> Done:
    """The forward and the backward of a batch."""
    (x,) = make_inputs(case, runner.device, generator, 1)
    x = with_gradients(x)
    out, forward_ms = timing.once(ours.bind(case, x), runner.device)
    backward = partial(torch.autograd.grad, out, (x.q, x.k, x.v), x.grad_out)
    gradients, backward_ms = timing.once(backward, runner.device)
    if not check:
        return (forward_ms, backward_ms), ()
    expected = checks.reference(case, x, backward=True)
    found = (out.detach(),), gradients
    errors = (checks.relative_error(a, b) for a, b in zip(found, (expected[:1], expected[1:])))
    return (forward_ms, backward_ms), tuple(errors)


def _chunks(runner: Runner, rng: random.Random) -> Row:
    """Chunks of a prefill: their queries are a part of their tensor, their K/V slices of the cache."""
    longest, count = runner.pick((8192, 50), (8192, 10), (64, 3))
    generator = torch.Generator(runner.device).manual_seed(runner.seed)
    (whole,) = make_inputs(_chunk_case(longest, longest), runner.device, generator, 1)
    cases = [_chunk_case(*pair) for pair in chunk_lengths(rng, longest, count)]

    def warm() -> None:
        warm_up(runner, ("chunked", "decode"), "cache", 1, longest)
        _chunk(runner, whole, _chunk_case(longest // 2, longest), False)

    return _measured(rng, cases, warm, partial(_chunk, runner, whole), gradients=False)


def chunk_lengths(rng: random.Random, longest: int, count: int) -> list[tuple[int, int]]:
    """(Sq, Skv) with Sq <= Skv."""
    pairs = []
    for _ in range(count):
        kv_len = rng.randint(1, longest)
        pairs.append((rng.randint(1, kv_len), kv_len))
    return pairs


def _chunk_case(q_len: int, kv_len: int) -> Case:
    return Case(q_len, kv_len, 1, HEADS, KV_HEADS, DIM, head_major=True)


def _chunk(runner: Runner, whole: Inputs, case: Case, check: bool) -> Done:
    k, v = (x[:, :, : case.kv_len] for x in (whole.k, whole.v))
    x = whole._replace(q=whole.q[:, :, : case.q_len], k=k, v=v)
    out, ms = timing.once(ours.bind(case, x), runner.device)
    return (ms,), (checks.relative_error((out,), checks.reference(case, x, backward=False)),) if check else ()


def with_errors(figures: dict[str, float], errors: Sequence[tuple[float, ...]]) -> Row:
    """A row of the figures and the largest relative errors: of the outputs and, if there are any, of the gradients."""
    checked = [found for found in errors if found]
    row: Row = {"figures": figures | {"checked": len(checked)}}
    limits = {"error": checks.OUTPUT_LIMIT, "gradient_error": checks.GRADIENT_LIMIT}
    for (name, limit), found in zip(limits.items(), zip(*checked, strict=True)):
        worst = max(found, key=lambda error: (math.isnan(error), error))
        row["figures"][f"largest_{name}"] = worst if math.isfinite(worst) else None
        try:
            checks.check_error(worst, limit)
        except ValueError as error:
            row["error"] = str(error)
    return row


class _PlanCounts:
    """How many plans were built and loaded, before `warm` and after it."""

    def __init__(self) -> None:
        self._before = self._warm = stats()["plans"]

    def warm(self) -> None:
        self._warm = stats()["plans"]

    def found(self) -> dict[str, float]:
        keys, after = ("builds", "disk_loads"), stats()["plans"]
        return {f"warm_{key}": self._warm[key] - self._before[key] for key in keys} | {
            key: after[key] - self._warm[key] for key in keys
        }
