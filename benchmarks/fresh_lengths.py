"""Of `benchmarks.plans` the section "fresh lengths": calls whose lengths no earlier call had.

Whatever a call has to build for its lengths, its caller waits for: the worst call of a row says how long.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from fastattn import stats
from fastattn.api import scaled_dot_product_attention
from fastattn.bench import check as checks
from fastattn.bench import timing
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS
from fastattn.bench.inputs import DTYPE, Inputs, make_inputs
from fastattn.bench.runner import Figures, Row, Runner
from fastattn.bench.timing import spread
from fastattn.masks import Segments
from fastattn.warming.run import warmup

CHECKED = 25  #: of a row's calls, compared with the reference
LEAST_CHECKED = 16  #: of fewer keys the gradients of q and k cancel, of one key to 0: no measure for an error
HEADS, KV_HEADS, DIM = 8, 2, 128
PADDED = 4  #: sequences in a batch with padding
METHOD = (
    "FASTATTN_PLANS=any; each call once, synchronized before and after, its mask made before. warm: what had been "
    "built or loaded ahead: for the first two rows by one call of the largest length; for packed batches by "
    "fastattn.warmup (phases packed and training) for every power of two of sequences from 16 and of tokens from 1024; "
    "for chunks by fastattn.warmup (phases chunked and decode: few queries go to a Triton kernel, which is compiled at "
    "first use for each size of its tile) and one call of the largest length. builds and disk_loads: what the fresh "
    "calls did, while the caller waited"
)

ours = IMPLEMENTATIONS["fastattn-any"]


class Batch(NamedTuple):
    """A call of a training step, as many queries as keys."""

    size: int  #: B
    length: int  #: S
    mask: str | Segments


def rows(runner: Runner) -> Iterator[Figures]:
    """The section's rows."""
    measures = {
        "forward and backward": _lengths,
        "left-padded batches": _padded_batches,
        "packed batches": _packed_batches,
        "chunks over a cache": _chunks,
    }
    for label, measure in measures.items():
        yield Figures("fresh lengths", label, partial(measure, runner, random.Random(runner.seed)))


def _lengths(runner: Runner, rng: random.Random) -> Row:
    longest, count = runner.pick((8192, 200), (8192, 20), (64, 3))
    first, *fresh = [Batch(1, n, "causal") for n in (longest, *rng.sample(range(1, longest + 1), count))]
    return _steps(runner, rng, fresh, lambda: _call_once(runner, first))


def _padded_batches(runner: Runner, rng: random.Random) -> Row:
    least, longest, count = runner.pick((64, 2048, 50), (64, 2048, 10), (16, 64, 3))

    def batch(length: int) -> Batch:
        padding = [rng.randrange(length) for _ in range(PADDED)]
        table = torch.tensor(padding, dtype=torch.int32, device=runner.device)
        return Batch(PADDED, length, Segments.left_padded(table, length, length))

    first, *fresh = [batch(n) for n in (longest, *(rng.randint(least, longest) for _ in range(count)))]
    return _steps(runner, rng, fresh, lambda: _call_once(runner, first))


def _packed_batches(runner: Runner, rng: random.Random) -> Row:
    least, most, sequences, count = runner.pick((512, 8192, 60, 50), (512, 8192, 60, 10), (32, 64, 6, 3))

    def batch(tokens: int) -> Batch:
        cuts = sorted(rng.sample(range(1, tokens), rng.randint(2, sequences) - 1))
        bounds = torch.tensor([0, *cuts, tokens], dtype=torch.int32, device=runner.device)
        return Batch(1, tokens, Segments.packed(bounds, causal=True))

    fresh = [batch(rng.randint(least, most)) for _ in range(count)]
    return _steps(runner, rng, fresh, lambda: _warm_up_packed(runner, most, sequences))


def _warm_up_packed(runner: Runner, tokens: int, sequences: int) -> None:
    """Training on up to that many packed tokens and sequences: plans know both by their power of two, not the batch.

    warmup packs two sequences into each batch entry, so it takes half as many entries as there are to be sequences.
    """
    places = 16
    while True:
        batch = places // 2
        _warm_up(runner, ("packed", "training"), "token_major", batch, tokens // batch)
        if places >= sequences:
            return
        places *= 2


def _warm_up(runner: Runner, phases: tuple[str, ...], layout: str, batch: int, longest: int) -> None:
    warmup(
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=DTYPE,
        device=runner.device,
        batch_sizes=(batch,),
        max_length=longest,
        phases=phases,
        layouts=(layout,),
        progress=False,
    )


def _steps(runner: Runner, rng: random.Random, fresh: Sequence[Batch], warm_up: Callable[[], object]) -> Row:
    """Forward and backward of batches, one after another, after a warm-up."""
    fit = [i for i, batch in enumerate(fresh) if batch.length >= LEAST_CHECKED]
    checked = set(rng.sample(fit, min(CHECKED, len(fit))))
    generator = torch.Generator(runner.device).manual_seed(runner.seed)
    before = stats()["plans"]
    with ours.active(gradients=True):
        warm_up()
        warm = stats()["plans"]
        done = [_train(runner, batch, generator, i in checked) for i, batch in enumerate(fresh)]
    forward, backward, errors = zip(*done, strict=True)
    figures = {"lengths": len(fresh), **_plan_counts(before, warm)}
    figures |= {f"forward_{key}": value for key, value in spread(forward).items()}
    figures |= {f"backward_{key}": value for key, value in spread(backward).items()}
    return _with_errors(figures, errors)


def _call_once(runner: Runner, batch: Batch) -> None:
    _train(runner, batch, torch.Generator(runner.device).manual_seed(runner.seed), False)


def _train(
    runner: Runner, batch: Batch, generator: torch.Generator, check: bool
) -> tuple[float, float, tuple[float, ...]]:
    """Milliseconds of the forward and the backward of a batch, and their relative errors if they are checked."""
    case = Case(batch.length, batch.length, batch.size, HEADS, KV_HEADS, DIM)
    (x,) = make_inputs(case, runner.device, generator, 1)
    inputs = [tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v)]
    call = partial(scaled_dot_product_attention, *inputs, mask=batch.mask)
    out, forward_ms = timing.once(call, runner.device)
    backward = partial(torch.autograd.grad, out, inputs, x.grad_out)
    gradients, backward_ms = timing.once(backward, runner.device)
    if not check:
        return forward_ms, backward_ms, ()
    expected = _reference(x, batch.mask)
    errors = checks.relative_error((out.detach(),), expected[:1]), checks.relative_error(gradients, expected[1:])
    return forward_ms, backward_ms, errors


def _reference(x: Inputs, mask: str | Segments) -> tuple[torch.Tensor, ...]:
    """The reference's output and gradients on float32 copies."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in (x.q, x.k, x.v)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the reference is slow
        out = scaled_dot_product_attention(*inputs, mask=mask, backend="reference")
    assert isinstance(out, torch.Tensor)
    return out.detach(), *torch.autograd.grad(out, inputs, x.grad_out.float())


def _chunks(runner: Runner, rng: random.Random) -> Row:
    longest, count = runner.pick((8192, 50), (8192, 10), (64, 3))
    generator = torch.Generator(runner.device).manual_seed(runner.seed)
    base = Case(longest, longest, 1, HEADS, KV_HEADS, DIM, head_major=True)
    (whole,) = make_inputs(base, runner.device, generator, 1)
    pairs = list(_pairs(rng, longest, count))
    checked = set(rng.sample(range(count), min(CHECKED, count)))
    before = stats()["plans"]
    with ours.active():
        _warm_up(runner, ("chunked", "decode"), "cache", 1, longest)
        _chunk(runner, whole, longest // 2, longest, False)
        warm = stats()["plans"]
        done = [_chunk(runner, whole, *pair, i in checked) for i, pair in enumerate(pairs)]
    times, errors = zip(*done, strict=True)
    figures = {"lengths": count, **_plan_counts(before, warm)}
    figures |= {f"forward_{key}": value for key, value in spread(times).items()}
    return _with_errors(figures, errors)


def _pairs(rng: random.Random, longest: int, count: int) -> Iterator[tuple[int, int]]:
    """(Sq, Skv) with Sq <= Skv."""
    for _ in range(count):
        kv_len = rng.randint(1, longest)
        yield rng.randint(1, kv_len), kv_len


def _chunk(runner: Runner, whole: Inputs, q_len: int, kv_len: int, check: bool) -> tuple[float, tuple[float, ...]]:
    """Milliseconds of a chunk of a prefill: its queries are a part of their tensor, its K/V slices of the cache."""
    case = Case(q_len, kv_len, 1, HEADS, KV_HEADS, DIM, head_major=True)
    x = whole._replace(q=whole.q[:, :, :q_len], k=whole.k[:, :, :kv_len], v=whole.v[:, :, :kv_len])
    out, ms = timing.once(ours.bind(case, x), runner.device)
    return ms, (checks.relative_error((out,), checks.reference(case, x, backward=False)),) if check else ()


def _with_errors(figures: dict[str, float], errors: Sequence[tuple[float, ...]]) -> Row:
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


def _plan_counts(before: dict[str, float], warm: dict[str, float]) -> dict[str, float]:
    after = stats()["plans"]
    found = {f"warm_{key}": warm[key] - before[key] for key in ("builds", "disk_loads")}
    return found | {key: after[key] - warm[key] for key in ("builds", "disk_loads")}
