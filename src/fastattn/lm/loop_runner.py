"""The runner for models that no faster runner takes: a state for each row, and one row after another."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .._compat.transformers import cache_argument, last_logits_only
from . import rope
from .runner import prefill_steps
from .visible import kept_whole


class LoopRunner:
    """A `Runner` over any transformers model for causal language modelling that hands its state on from call to call.

    The state is a DynamicCache, or whatever else the model's forward returns and takes (RWKV's `state`). A decode step
    is one forward pass per row, and caches grow, so that steps cannot be captured.

    A model with longrope whose row grows beyond its original length has the whole row computed anew, once, as all its
    keys are turned by other angles then. One with dynamic rotary positions has what they remember kept for each row:
    every row says what `generate` would say to it alone.

    Args:
        model, rows, capacity: as of every runner.
        prefill_step: tokens of a prompt at a time. Default: `runner.PREFILL_STEP`.
        in_steps: whether the model can go on from a state with several tokens. Otherwise a row's first prompt goes
            through it at once, and what follows token by token.
        told: whether the model is given positions and a mask of ones, as `generate` does: some need them.
        own_cache: whether the model makes the cache for a row's first tokens, of a kind of its own.

    Raises ValueError for a model that has no state to hand on.
    """

    capturable = False

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        prefill_step: int | None = None,
        in_steps: bool = True,
        told: bool = False,
        own_cache: bool = False,
    ) -> None:
        self._model, self._arguments = model, signature(model.forward).parameters
        self._cache_name = None if own_cache else cache_argument(model)
        if self._cache_name is None and "use_cache" not in self._arguments:
            raise ValueError(f"{type(model).__name__} hands no state on from token to token")
        self.rows, self.capacity = rows, capacity
        self.vocab_size = vocabulary(model)
        self.device: torch.device = model.device
        self._config = model.config.get_text_config(decoder=True)
        self._cache_config = kept_whole(self._config)
        self._one = last_logits_only(model)
        self._turn = rope.fixed_up_to(self._config)
        self._anew = rope.is_turned_anew(self._config)
        # All tokens of a prompt are turned by the same angles.
        self._in_steps, self._step = in_steps and self._turn is None, prefill_step
        self._rotary = _Remembered(model) if rope.remembers(self._config) else None
        self._told = [name for name in ("position_ids", "attention_mask") if told and name in self._arguments]
        self._states = [self._empty() for _ in range(rows)]

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """See `Runner`."""
        state, ids = self._states[row], ids[None]
        if not self._in_steps and state.length:
            for one in ids.split(1, 1):
                logits = self._forward(state, one)
            return logits
        if not self._in_steps:
            return self._forward(state, ids)
        # Where logits of every position are made, the last step is the last token alone: nobody reads the others.
        count = ids.shape[1]
        steps = prefill_steps(count, self._step) if self._one else [*prefill_steps(count - 1, self._step), 1]
        *body, last = ids.split(steps, 1)
        for step in body:
            self._call(self._model.base_model if self._cache_name else self._model, state, step)
        return self._forward(state, last)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """See `Runner`."""
        return torch.stack([self._decode(self._states[row], one) for row, one in enumerate(ids.split(1))])

    def clear(self, row: int) -> None:
        """See `Runner`."""
        self._states[row] = self._empty()

    def move(self, source: int, target: int) -> None:
        """See `Runner`."""
        if source != target:
            self._states[target] = self._states[source]
            self.clear(source)

    def _decode(self, state: _State, ids: Tensor) -> Tensor:
        if state.length >= self.capacity:  # beyond it a model may have no position embedding
            return torch.zeros(self.vocab_size, dtype=self._model.dtype, device=self.device)
        return self._forward(state, ids[None])

    def _forward(self, state: _State, ids: Tensor) -> Tensor:
        """The logits `[V]` after ids `[1, S]`."""
        if self._anew and self._turn is not None:
            begin, end = state.length, state.length + ids.shape[1]
            if begin <= self._turn < end and begin:
                ids = torch.cat([*state.ids, ids], 1)
                state.__dict__.update(self._empty().__dict__)
            if end <= self._turn:
                state.ids.append(ids.clone())  # the caller writes its next tokens there
        logits: Tensor = self._call(self._model, state, ids, **self._one).logits
        return logits[0, -1]

    def _call(self, module: Any, state: _State, ids: Tensor, **options: Any) -> Any:
        if "use_cache" in self._arguments:
            options["use_cache"] = True
        if self._told:
            whole = torch.arange(state.length + ids.shape[1], device=self.device)[None]
            given = {"position_ids": whole[:, state.length :], "attention_mask": torch.ones_like(whole)}
            options |= {name: given[name] for name in self._told}
        if self._rotary is not None:
            self._rotary.restore(state.rotary)
        found = module(input_ids=ids, **state.kept, **options)
        if self._rotary is not None:
            state.rotary = self._rotary.now()
        state.length += ids.shape[1]
        if self._cache_name is None:
            carried = {name: x for name, x in found.items() if name in self._arguments and name not in _NO_STATE}
            state.kept.update(carried)
        return found

    def _empty(self) -> _State:
        from transformers import DynamicCache

        cache = {} if self._cache_name is None else {self._cache_name: DynamicCache(config=self._cache_config)}
        return _State(cache)


_NO_STATE = frozenset({"logits", "loss", "hidden_states", "attentions", "last_hidden_state"})


class _State:
    """What a row holds."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept  #: what the forward is given, beside tokens
        self.length = 0  #: tokens
        self.ids: list[Tensor] = []  #: the tokens `[1, n]`, as long as they may be computed anew
        self.rotary: Any = None  #: of `_Remembered`; None: as before the first text


class _Remembered:
    """What a model's rotary modules remember of the texts that went through them."""

    def __init__(self, model: Any) -> None:
        self._modules = [
            module for module in model.modules()
            if module._buffers and not module._modules and not module._parameters
        ]  # fmt: skip
        with torch.inference_mode():  # a short text puts back what longer ones have changed
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        self._new = self.now()

    def now(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Everything as it is."""
        return [
            ({name: x for name, x in vars(module).items() if not name.startswith("_")}, dict(module._buffers))
            for module in self._modules
        ]

    def restore(self, kept: list[tuple[dict[str, Any], dict[str, Any]]] | None) -> None:
        """Makes everything what it was. None: before the first text."""
        for module, (values, buffers) in zip(self._modules, kept or self._new, strict=True):
            vars(module).update(values)
            module._buffers.update(buffers)


def vocabulary(model: Any) -> int:
    """How many logits a model makes for a token."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    size: int = model.config.get_text_config(decoder=True).vocab_size if weight is None else weight.shape[0]
    return size
