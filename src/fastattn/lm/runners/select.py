"""`make_runner`: which runner a model gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..._compat.transformers import attention_name
from ...common.failures import first_line
from ...common.notice import warn_once
from ..checks import check_int
from ..loading.loaded import Loaded, max_length
from ..runner import Runner
from ..verification import ReferenceLogits
from .fused import FusedRunner
from .module import ModuleRunner
from .per_row import PerRowRunner
from .recompute import RecomputeRunner


@dataclass(frozen=True)
class Candidate:
    """A runner that may take a model."""

    make: Callable[..., Runner]  #: called with the model, rows, capacity and the options; ValueError: refused
    options: dict[str, Any] = field(default_factory=dict)
    slow: str = ""  #: how a model is decoded by it, for a warning; "": fast, no warning
    check_long: bool = False  #: whether a model is refused whose logits of a long text are random


PER_ROW = "one row after another, which is slow"
WHOLE_TEXT = "by a forward pass over the whole text for each token, which is very slow"


def candidates(loaded: Loaded) -> list[Candidate]:
    """The runners to try for a model, the fastest first."""
    # The parameters of a model that is spread over ranks may be of another type; liger-kernel is untested there.
    module = Candidate(ModuleRunner, {"fused_ops": loaded.fused_ops if loaded.ranks is None else False})
    # Runners that bring their own attention are for models whose attention is fastattn's.
    fast = [Candidate(FusedRunner)] if attention_name(loaded.model.config) == "fastattn" else []
    whole_prompt: dict[str, Any] = {"split_prompts": False}
    positions = {**whole_prompt, "pass_positions": True}
    return [
        *fast,
        module,
        Candidate(PerRowRunner, {}, PER_ROW),
        Candidate(PerRowRunner, whole_prompt, PER_ROW),
        Candidate(PerRowRunner, positions, PER_ROW),
        Candidate(PerRowRunner, {**positions, "own_cache": True}, PER_ROW),
        Candidate(RecomputeRunner, {}, WHOLE_TEXT, check_long=True),
    ]


def make_runner(loaded: Loaded, rows: int, capacity: int, *, prefill_step: int | None = None) -> Runner:
    """The fastest runner that takes the model and reproduces the logits of the model's own forward on short texts.

    In this order: fused kernels, the model's own modules, one row after another, the whole text for each token.

    Args:
        loaded: the model. Only a model whose attention is fastattn's gets a runner that brings its own attention.
        rows: the number of sequences, >= 1.
        capacity: the number of tokens of each, >= 1.
        prefill_step: prompt tokens per forward pass, about; >= 1. Default: `runner.PREFILL_STEP`. A model that needs
            its whole prompt at once gets it at once.

    Ranks that run the model together all get the same kind of runner.

    Raises:
        ValueError: rows, capacity or step is below 1; the capacity exceeds the model's positions; the model is no
            causal language model (see `verification.ReferenceLogits`), or no runner can run it; the model was loaded
            with `fused_ops=True`, and no runner that uses them takes it.
    """
    rows, capacity = check_int("rows", rows), check_int("capacity", capacity)
    if prefill_step is not None:
        prefill_step = check_int("prefill_step", prefill_step)
    if capacity > max_length(loaded):
        raise ValueError(f"capacity: expected at most the model's {max_length(loaded)} tokens, got {capacity}")
    return first_that_fits(candidates(loaded), loaded, rows, capacity, prefill_step)


def first_that_fits(
    tried: Sequence[Candidate], loaded: Loaded, rows: int, capacity: int, prefill_step: int | None = None
) -> Runner:
    """The runner of the first candidate that takes the model. See `make_runner`.

    Warns if it is a slow one, with the reason why the last fast one was refused.
    """
    reference = ReferenceLogits(loaded.model)
    why_not_fast = reason = ""
    for candidate in tried:
        if candidate.slow and loaded.fused_ops:
            raise ValueError(
                f"fused_ops: cannot be used with {loaded.name}, it is decoded one row after another: {reason}"
            )
        runner, reason = _try(candidate, loaded, reference, rows, capacity, prefill_step)
        if runner is not None:
            if candidate.slow:
                warn_once(f"{loaded.name} is decoded {candidate.slow}: {why_not_fast}", f"slow {loaded.name}")
            return runner
        if not candidate.slow:
            why_not_fast = reason
    raise ValueError(f"model: {loaded.name} cannot be run: {reason}")


def _try(
    candidate: Candidate,
    loaded: Loaded,
    reference: ReferenceLogits,
    rows: int,
    capacity: int,
    prefill_step: int | None,
) -> tuple[Runner | None, str]:
    """The candidate's runner, if on all ranks it can be made and reproduces the logits; else None and the reason."""
    runner: Runner | None = None
    reason = ""
    step = {} if prefill_step is None else {"prefill_step": prefill_step}
    try:
        runner = candidate.make(loaded.model, rows, capacity, **candidate.options, **step)
        reference.check(runner)
        if candidate.check_long:
            reference.check_long(min(capacity, 512))
    except ValueError as error:
        runner, reason = None, first_line(error)
    if loaded.ranks is not None:
        elsewhere = loaded.ranks.first_failure(reason if runner is None else None)
        if elsewhere is not None:
            runner, reason = None, elsewhere
    return runner, reason
