"""Which runner a model gets, and what it says of itself: how long its sequences may be, which tokens end a text."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .._compat.transformers import attention_name
from ..common.notice import warn_once
from . import rope
from .checks import check_int
from .load import Loaded, _line
from .probe import Probe
from .runner import Runner


def make_runner(loaded: Loaded, rows: int, capacity: int, *, prefill_step: int | None = None) -> Runner:
    """The fastest runner that takes the model: fused kernels, its own modules, one row after another, or the whole text
    anew for each token. Each is tried on a few tokens first: it must say what the model's forward pass says.

    Args:
        loaded: the model. Only one whose attention is fastattn's is given to runners that bring their own attention.
        rows: how many sequences it holds, >= 1.
        capacity: how many tokens each may have, >= 1.
        prefill_step: how many tokens of a prompt go through the model at a time, about; >= 1. Default:
            `runner.PREFILL_STEP`. Where every token must go through at once, a prompt does.

    Ranks that run the model together all get the same kind of runner.

    Raises ValueError for rows, a capacity or a step below 1, for a capacity beyond the model's positions, and for a
    model that is no causal language model (see `probe.Probe`) or that no runner can run; where the model was loaded
    with `fused_ops=True`, also when no runner that has a use for them takes it.
    """
    rows, capacity = check_int("rows", rows), check_int("capacity", capacity)
    if prefill_step is not None:
        prefill_step = check_int("prefill_step", prefill_step)
    if capacity > longest(loaded):
        raise ValueError(f"capacity: expected at most the model's {longest(loaded)} tokens, got {capacity}")
    probe = Probe(loaded.model)
    given = {} if prefill_step is None else {"prefill_step": prefill_step}
    reason = ""
    for module, name, options in _runners(loaded):
        runner, why = _try(loaded, probe, rows, capacity, module, name, options | given)
        if runner is not None:
            return runner
        reason = why
    if loaded.fused_ops:
        raise ValueError(f"fused_ops: cannot be used with {loaded.name}, it is decoded one row after another: {reason}")
    for module, name, options, how in _SLOW:
        runner, why = _try(loaded, probe, rows, capacity, module, name, options | given)
        if runner is not None:
            warn_once(f"{loaded.name} is decoded {how}: {reason}", f"loop {loaded.name}")
            return runner
    raise ValueError(f"model: {loaded.name} cannot be run: {why}")


def _try(
    loaded: Loaded, probe: Probe, rows: int, capacity: int, module: str, name: str, options: dict[str, Any]
) -> tuple[Runner | None, str]:
    """A runner, if it can be made and says what the model says, on all ranks, and if not why."""
    try:
        kind = getattr(import_module(f"{__package__}.{module}"), name)
    except (ImportError, AttributeError) as error:
        return None, _line(error)
    runner: Runner | None = None
    reason = ""
    try:
        runner = kind(loaded.model, rows, capacity, **options)
        probe.check(runner)
        if name == "WholeRunner":
            probe.check_long(min(capacity, 512))
    except ValueError as error:
        runner, reason = None, _line(error)
    if loaded.ranks is not None:
        elsewhere = loaded.ranks.trouble(reason if runner is None else None)
        if elsewhere is not None:
            runner, reason = None, elsewhere
    return runner, reason


def _runners(loaded: Loaded) -> list[tuple[str, str, dict[str, Any]]]:
    """Modules of this package, their runners and what those are told beside the model, the fastest first."""
    # The parts of a spread model may be tensors of another kind; there liger-kernel has not been tried.
    modules = ("module_runner", "ModuleRunner", {"fused_ops": loaded.fused_ops if loaded.ranks is None else False})
    ours = attention_name(loaded.model.config) == "fastattn"
    return [("fused", "FusedRunner", {}), modules] if ours else [modules]


_LOOP = "one row after another, which is slow"
_WHOLE = "by a forward pass over the whole text for each token, which is very slow"
#: The same for those that remain, and how they decode.
_SLOW: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("loop_runner", "LoopRunner", {}, _LOOP),
    ("loop_runner", "LoopRunner", {"in_steps": False}, _LOOP),
    ("loop_runner", "LoopRunner", {"in_steps": False, "told": True}, _LOOP),
    ("loop_runner", "LoopRunner", {"in_steps": False, "told": True, "own_cache": True}, _LOOP),
    ("whole_runner", "WholeRunner", {}, _WHOLE),
)


def longest(loaded: Loaded) -> int:
    """How many positions the model has, see `rope.longest`."""
    return rope.longest(loaded.config)


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text: eos_token_id of the model's generation_config, one, several or none, and the
    tokenizer's eos_token. Raises ValueError unless those are token ids."""
    named = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    found = list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"generation_config: eos_token_id: expected token ids, got {named!r:.80}")
    own = getattr(loaded.tokenizer, "eos_token_id", None)
    return frozenset(token for token in (*found, own) if token is not None and token >= 0)
