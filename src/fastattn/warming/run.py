"""`warmup`: builds the plans and kernels of given kinds of calls, which their first calls would build otherwise.

The op is called on small random tensors, once for each kind of call that has its own plan or kernel. `kinds` lists
those (see docs/plans.md): a plan depends on a length or a batch size only by the next power of two.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..api import Explanation, explain, scaled_dot_product_attention
from ..backends.base import Compiled
from ..backends.cudnn import plans
from ..backends.triton.binaries import store
from ..backends.triton.binaries.flag_set import FlagSet
from ..backends.triton.binaries.policy import waiting
from ..counters import stats
from ..dispatch import registry, routes
from ..dispatch.native import calls as native
from ..masks import Intervals, Segments
from ..validation import check_flag
from .kinds import LAYOUTS, Attention, Kind, Trial, check_positive, check_sequence, kinds_of
from .progress import track
from .report import Family, Warmth


def warmup(
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_length: int = 8192,
    masks: Sequence[str | None] = ("causal",),
    windows: Sequence[tuple[int, int] | None] = (None,),
    sinks: bool = False,
    softcap: float | None = None,
    phases: Sequence[str] = ("prefill", "chunked", "decode"),
    layouts: Sequence[str] = ("token_major", "cache"),
    progress: bool = True,
) -> Warmth:
    """Builds plans and kernels, so that no later call of these kinds waits for a build, or is served by a slower kernel
    until its own is compiled.

    It warms up every combination of the arguments, for any length up to `max_length`, by calling the op on small random
    tensors. The state of torch's random generators is unchanged. A device without plans (the CPU) has little to build.

    Args:
        q_heads, kv_heads, head_dim, value_dim: Hq, Hkv, D and Dv (default D) of the op. dtype: of q, k, v and the
        sinks. device: default: the current GPU if there is one, else the CPU. batch_sizes: numbers of sequences. Those
        with the same next power of two share plans. max_length: the longest sequence, queries or keys. masks: None and
        "causal", as in the op. windows: None and pairs `(left, right)`, as in the op. Pass both for a window that is
        only used if there are more
            keys (as in `fastattn.hf`).
        sinks: whether there are sinks.
        softcap: as in the op.
        phases: of "prefill" (as many queries as keys, with padding on the left or none), "chunked" (fewer queries than
            keys, or lengths on the device), "decode" (one query), "training" (as prefill, with gradients for q, k, v
            and sinks) and "packed" (up to 16 sequences end to end, `Segments` of which queries and keys are the same;
            with "training" among the phases, that as well).
        layouts: of "token_major" (`[B,S,H,D]` in memory), "cache" (queries token-major, keys and values slices of
            `[B,H,capacity,D]`), "head_major" (the queries too are `[B,H,S,D]`) and "head_major_qk" (all but the
            values).
        progress: shows it on stderr.

    Returns:
        What was built, by family, and which backend serves each. It prints as a table.

    Raises:
        ValueError: an argument is not as described; the message names it.
    """
    attention = Attention(
        q_heads,
        kv_heads,
        head_dim,
        head_dim if value_dim is None else value_dim,
        dtype,
        check_sequence("masks", masks),
        check_sequence("windows", windows),
        sinks,
        softcap,
        check_sequence("phases", phases),
        check_sequence("layouts", layouts),
    )
    return warm([attention], device=device, batch_sizes=batch_sizes, max_length=max_length, progress=progress)


def warm(
    attentions: Sequence[Attention],
    *,
    device: str | torch.device | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_length: int = 8192,
    progress: bool = True,
    notes: Sequence[str] = (),
) -> Warmth:
    """`warmup` for several kinds of attention. notes: additional lines of the report."""
    from ..lm.loading.device import pick_device

    on = pick_device(device)
    if on.type == "cuda" and on.index is None:
        on = torch.device("cuda", torch.cuda.current_device())
    batches = check_sequence("batch_sizes", batch_sizes)
    for batch in batches:
        check_positive("batch_sizes", batch)
    check_positive("max_length", max_length)
    check_flag("progress", progress)
    kinds = [kind for attention in attentions for kind in kinds_of(attention, batches, max_length, _has_plans(on))]
    start, before = time.perf_counter(), stats()["binaries"]
    if on.type == "cuda":
        native.start()
    failed = _compile(kinds, on, progress)
    with waiting():
        families = tuple(_warm_kind(kind, on) for kind in track(kinds, str, progress))
    after = stats()["binaries"]
    return Warmth(
        str(on),
        families,
        (*notes, *_native(on)),
        (time.perf_counter() - start) * 1e3,
        sum(int(after[name] - before[name]) for name in ("compiles", "background_compiles")),
        int(after["disk_loads"] - before["disk_loads"]),
        failed,
    )


def _compile(kinds: Sequence[Kind], device: torch.device, progress: bool) -> tuple[str, ...]:
    """Compiles the kernels that calls of all kinds need, side by side. Returns which failed, and why."""
    missing = store.shared.missing(_flag_sets(kinds, device))
    made = store.shared.make_all(missing, device.index)
    shown = track(missing, lambda flags: f"compiling {flags}", progress)
    return tuple([f"{flags}: {why}" for flags, (_, why) in zip(shown, made, strict=True) if why])


def _flag_sets(kinds: Sequence[Kind], device: torch.device) -> list[FlagSet]:
    """Of the backends that will serve calls of all kinds once their kernels are there."""
    names = registry.allowed()
    if not any(isinstance(registry.backend(name), Compiled) for name in names):
        return []
    found: dict[FlagSet, None] = {}
    for kind in kinds:
        for trial in kind.trials:
            try:
                with _trial(kind, trial, device) as (q, k, v, arguments):
                    problem = explain(q, k, v, **arguments).problem
            except torch.OutOfMemoryError:  # the call itself will say so
                torch.cuda.empty_cache()
                continue
            for one in (problem, replace(problem, backward=True)) if problem.grads else (problem,):
                first = routes.first_choice(one, names)
                if isinstance(first, Compiled):
                    found |= dict.fromkeys(first.binaries(one))
    return list(found)


def _native(device: torch.device) -> tuple[str, ...]:
    """Waits for the native module. Returns what is to be said of it, where it was wanted and is not there."""
    if device.type != "cuda":
        return ()
    native.wait()
    why = native.builder.why
    return (f"calls that come back go through Python, there is no native module: {why}",) if why else ()


def _has_plans(device: torch.device) -> bool:
    """Whether what is built for a call depends on its lengths."""
    return device.type == "cuda"


def _warm_kind(kind: Kind, device: torch.device) -> Family:
    """Makes the trial calls of one kind."""
    before, start = stats()["plans"], time.perf_counter()
    served: dict[str, None] = {}
    notes: dict[str, None] = {}
    avoidable = False
    for trial in kind.trials:
        try:
            found = _call(kind, trial, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            notes[f"not ready: out of memory at {trial.q_len} queries and {trial.kv_len} keys"] = None
            avoidable = True
            continue
        if found.chosen is None:
            notes[f"no allowed backend serves it: {_refusals(found)}"] = None
            avoidable = True
            continue
        served[found.chosen] = None
        if found.chosen == "reference":
            notes[f"runs on the slow reference: {_refusals(found)}"] = None
            avoidable |= _avoidable(found)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        plans.shared.wait()  # some are built in the background, and lost if the process ends now
    store.shared.wait()  # what a backward asked for, on a thread of torch's
    after = stats()["plans"]
    return Family(
        str(kind),
        tuple(served),
        sum(int(after[name] - before[name]) for name in ("builds", "background_builds")),
        int(after["disk_loads"] - before["disk_loads"]),
        (time.perf_counter() - start) * 1e3,
        tuple(notes),
        avoidable,
    )


@contextmanager
def _trial(kind: Kind, trial: Trial, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """The arguments of a call, and the state of torch in which it is to be made."""
    a, training = kind.attention, kind.phase.endswith("training")
    with torch.inference_mode(False), torch.set_grad_enabled(training), torch.autocast(device.type, enabled=False):
        generator = torch.Generator(device).manual_seed(0)
        shapes = (
            (a.q_heads, trial.q_len, a.head_dim),
            (a.kv_heads, trial.kv_len, a.head_dim),
            (a.kv_heads, trial.kv_len, a.value_dim),
        )
        q, k, v = (
            _tensor(layout, (kind.batch, *shape), row, a.dtype, generator).requires_grad_(training)
            for layout, shape, row in zip(LAYOUTS[trial.layout], shapes, a.rows)
        )
        arguments: dict[str, Any] = {"mask": kind.mask, "window": kind.window, "softcap": a.softcap}
        if a.sinks:
            sinks = torch.randn(a.q_heads, dtype=a.dtype, device=device, generator=generator)
            arguments["sinks"] = sinks.requires_grad_(training)
        yield q, k, v, arguments | _lengths(trial, kind.batch, kind.mask == "causal", device)


def _call(kind: Kind, trial: Trial, device: torch.device) -> Explanation:
    """Makes one call. Returns which backend served it, and why the others did not."""
    with _trial(kind, trial, device) as (q, k, v, arguments):
        try:
            out = scaled_dot_product_attention(q, k, v, **arguments)
        except registry.BackendError:
            return explain(q, k, v, **arguments)
        if q.requires_grad:
            assert isinstance(out, Tensor)
            wanted = [x for x in (q, k, v, arguments.get("sinks")) if x is not None]
            torch.autograd.grad(out, wanted, torch.zeros_like(out))
        return explain(q, k, v, **arguments)  # after the call, because a backend may refuse only when it is called


def _lengths(trial: Trial, batch: int, causal: bool, device: torch.device) -> dict[str, Any]:
    """The op's arguments with lengths on the device. All are the full lengths, so that no row is fully masked."""

    def number(n: int, *shape: int) -> Tensor:
        return torch.full(shape, n, dtype=torch.int32, device=device)

    if trial.lengths == "intervals":
        return {"mask": Intervals(number(0, batch, 1), number(trial.kv_len, batch, 1)), "window": None}
    if trial.lengths == "padded":
        return {"mask": Segments.left_padded(number(0, batch), trial.q_len, trial.kv_len, causal=causal)}
    if trial.lengths == "packed":
        half = trial.q_len // 2
        row = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(2)
        bounds = torch.tensor([[0, half], [half, trial.q_len]], dtype=torch.int32, device=device).repeat(1, batch)
        return {"mask": Segments(torch.cat([row[None], bounds]), causal)}
    found = {"kv_lengths": number(trial.kv_len, batch)} if trial.lengths else {}
    return found | ({"q_lengths": number(trial.q_len, batch)} if trial.lengths == "both" else {})


def _tensor(layout: str, shape: tuple[int, ...], row: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    batch, heads, length, dim = shape
    settings: Any = {"dtype": dtype, "device": generator.device, "generator": generator}
    if layout == "token":
        whole = torch.randn(batch, length, max(row, heads * dim), **settings)
        return whole[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    return torch.randn(batch, heads, length + (layout == "slice"), dim, **settings)[:, :, :length]


def _refusals(found: Explanation) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in found.reasons.items() if why)


def _avoidable(found: Explanation) -> bool:
    """Whether a fast backend would serve such calls if it was not switched off, or if something was installed."""
    problem = found.problem
    absent = [name for name in registry.NAMES[:-1] if name not in found.reasons]
    if not all(routes.reasons(problem, absent).values()):
        return True
    if problem.device != "cuda":
        return False
    from ..backends.cudnn import runtime, support

    return not support.reasons(problem, runtime.frontend().version)
