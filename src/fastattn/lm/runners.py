"""Which runner a model gets, and what it says of itself: how long its sequences may be, which tokens end a text."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .._compat.transformers import attention_name
from ..notice import warn_once
from .load import Loaded, _line
from .loop_runner import LoopRunner
from .runner import Runner


def make_runner(loaded: Loaded, rows: int, capacity: int) -> Runner:
    """The fastest runner that takes the model: fused kernels, its own modules, or one row after another.

    Args:
        loaded: the model. Only one whose attention is fastattn's is given to runners that bring their own attention.
        rows: how many sequences it holds, >= 1.
        capacity: how many tokens each may have, >= 1.

    Ranks that run the model together all get the same kind of runner.

    Raises ValueError for rows or a capacity below 1, or a capacity beyond the model's positions; where the model was
    loaded with `fused_ops=True`, also when no runner that has a use for them takes it.
    """
    for name, value in (("rows", rows), ("capacity", capacity)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if capacity > longest(loaded):
        raise ValueError(f"capacity: expected at most the model's {longest(loaded)} tokens, got {capacity}")
    reason = ""
    for module, name, options in _runners(loaded):
        try:
            kind = getattr(import_module(f"{__package__}.{module}"), name)
        except (ImportError, AttributeError) as error:
            reason = _line(error)
            continue
        runner: Runner | None = None
        try:
            runner = kind(loaded.model, rows, capacity, **options)
        except ValueError as error:
            reason = _line(error)
        if loaded.ranks is not None:
            elsewhere = loaded.ranks.trouble(reason if runner is None else None)
            if elsewhere is not None:
                reason, runner = elsewhere, None
        if runner is not None:
            return runner
    if loaded.fused_ops:
        raise ValueError(f"fused_ops: cannot be used with {loaded.name}, it is decoded one row after another: {reason}")
    warn_once(f"{loaded.name} is decoded one row after another, which is slow: {reason}", f"loop {loaded.name}")
    return LoopRunner(loaded.model, rows, capacity)


def _runners(loaded: Loaded) -> list[tuple[str, str, dict[str, Any]]]:
    """Modules of this package, their runners and what those are told beside the model, the fastest first."""
    # The parts of a spread model may be tensors of another kind; there liger-kernel has not been tried.
    modules = ("module_runner", "ModuleRunner", {"fused_ops": loaded.fused_ops if loaded.ranks is None else False})
    ours = attention_name(loaded.model.config) == "fastattn"
    return [("fused", "FusedRunner", {}), modules] if ours else [modules]


def longest(loaded: Loaded) -> int:
    """How many positions the model has."""
    return getattr(loaded.config, "max_position_embeddings", None) or 2**31


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text: eos_token_id of the model's generation_config, one, several or none."""
    found = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(int(token) for token in (found if isinstance(found, (list, tuple)) else [found]))
