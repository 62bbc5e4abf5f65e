"""`PerRowRunner`: one forward pass per row, for models that no faster runner takes."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..._compat.transformers import cache_argument, last_logits_only
from .. import rope
from ..mask_predicates import without_windows
from ..runner import prefill_steps


class PerRowRunner:
    """A `Runner` over any causal language model of transformers whose forward returns a state and takes it again.

    The state is a DynamicCache, or what else the model's forward returns and takes (RWKV's `state`). A decode step is
    one forward pass per row. It cannot be captured, because caches grow.

    A row of a model with longrope is computed once more when it grows beyond the original length, because all its keys
    get other angles then. For a model with dynamic rotary positions the state of its rotary modules is stored per row.
    So every row gets the tokens that `generate` gives it alone.

    Args:
        model, rows, capacity: as of every runner.
        prefill_step: prompt tokens per forward pass. Default: `runner.PREFILL_STEP`.
        split_prompts: whether the model can continue a state with several tokens. If not, the first prompt of a row is
            one forward pass, and later tokens are one forward pass each.
        pass_positions: whether the model gets positions and an attention mask of ones, as from `generate`. Some models
            need them.
        own_cache: whether the model creates its own cache, of its own type, with a row's first tokens.

    Raises ValueError for a model whose forward returns no state.
    """

    capturable = False

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        prefill_step: int | None = None,
        split_prompts: bool = True,
        pass_positions: bool = False,
        own_cache: bool = False,
    ) -> None:
        self._model, self._arguments = model, signature(model.forward).parameters
        self._cache_name = None if own_cache else cache_argument(model)
        if self._cache_name is None and "use_cache" not in self._arguments:
            raise ValueError(f"{type(model).__name__} passes no state on from token to token")
        self.rows, self.capacity = rows, capacity
        self.vocab_size = vocabulary_size(model)
        self.device: torch.device = model.device
        self._config = model.config.get_text_config(decoder=True)
        self._cache_config = without_windows(self._config)
        self._last_only = last_logits_only(model)
        self._rope_limit = rope.length_independent_up_to(self._config)
        self._restarts = rope.changes_all_angles_once(self._config)
        # Where angles depend on the text's length, all tokens of a prompt need those of the whole prompt.
        self._split_prompts, self._step = split_prompts and self._rope_limit is None, prefill_step
        self._rotary = _RotaryState(model) if rope.stores_longest_length(self._config) else None
        passed = ("position_ids", "attention_mask") if pass_positions else ()
        self._passed = [name for name in passed if name in self._arguments]
        self._states = [self._empty() for _ in range(rows)]

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """See `Runner`."""
        state, ids = self._states[row], ids[None]
        if not self._split_prompts and state.length:
            for one in ids.split(1, 1):
                logits = self._forward(state, one)
            return logits
        if not self._split_prompts:
            return self._forward(state, ids)
        # A model that computes logits of every position gets its last token alone: the other logits are not needed.
        count = ids.shape[1]
        steps = prefill_steps(count, self._step) if self._last_only else [*prefill_steps(count - 1, self._step), 1]
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
        if state.length >= self.capacity:  # a model may have no embedding of later positions
            return torch.zeros(self.vocab_size, dtype=self._model.dtype, device=self.device)
        return self._forward(state, ids[None])

    def _forward(self, state: _State, ids: Tensor) -> Tensor:
        """The logits `[V]` after ids `[1, S]`."""
        if self._restarts and self._rope_limit is not None:
            begin, end = state.length, state.length + ids.shape[1]
            if begin <= self._rope_limit < end and begin:
                ids = torch.cat([*state.ids, ids], 1)
                state.reset(self._new_arguments())
            if end <= self._rope_limit:
                state.ids.append(ids.clone())  # the caller overwrites its tensor
        logits: Tensor = self._call(self._model, state, ids, **self._last_only).logits
        return logits[0, -1]

    def _call(self, module: Any, state: _State, ids: Tensor, **options: Any) -> Any:
        if "use_cache" in self._arguments:
            options["use_cache"] = True
        if self._passed:
            whole = torch.arange(state.length + ids.shape[1], device=self.device)[None]
            given = {"position_ids": whole[:, state.length :], "attention_mask": torch.ones_like(whole)}
            options |= {name: given[name] for name in self._passed}
        if self._rotary is not None:
            self._rotary.restore(state.rotary)
        found = module(input_ids=ids, **state.arguments, **options)
        if self._rotary is not None:
            state.rotary = self._rotary.copy()
        state.length += ids.shape[1]
        if self._cache_name is None:
            returned = {name: x for name, x in found.items() if name in self._arguments and name not in _NO_STATE}
            state.arguments.update(returned)
        return found

    def _empty(self) -> _State:
        return _State(self._new_arguments())

    def _new_arguments(self) -> dict[str, Any]:
        from transformers import DynamicCache

        return {} if self._cache_name is None else {self._cache_name: DynamicCache(config=self._cache_config)}


_NO_STATE = frozenset({"logits", "loss", "hidden_states", "attentions", "last_hidden_state"})


class _State:
    """The state of a row."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.reset(arguments)

    def reset(self, arguments: dict[str, Any]) -> None:
        """Empties the row. arguments: those of the model's forward that carry the state."""
        self.arguments = arguments
        self.length = 0  #: tokens
        self.ids: list[Tensor] = []  #: the tokens `[1, n]`, as long as they may have to be computed once more
        self.rotary: Any = None  #: from `_RotaryState.copy`; None: as before the first text


class _RotaryState:
    """The state of a model's rotary modules that depends on the texts they have processed."""

    def __init__(self, model: Any) -> None:
        self._modules = [module for module in model.modules() if has_only_buffers(module)]
        with torch.inference_mode():  # a short text resets what longer texts have changed
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        self._initial = self.copy()

    def copy(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each module its attributes and its buffers."""
        return [
            (
                {name: x for name, x in vars(module).items() if not name.startswith("_")},
                dict(module.named_buffers(recurse=False)),
            )
            for module in self._modules
        ]

    def restore(self, state: list[tuple[dict[str, Any], dict[str, Any]]] | None) -> None:
        """Restores what `copy` returned. None: the state before the first text."""
        for module, (values, buffers) in zip(self._modules, state or self._initial, strict=True):
            vars(module).update(values)
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def has_only_buffers(module: torch.nn.Module) -> bool:
    """Whether a module has buffers, and neither parameters nor children."""
    has_buffers = any(True for _ in module.buffers(recurse=False))
    has_parameters = any(True for _ in module.parameters(recurse=False))
    return has_buffers and not has_parameters and not any(True for _ in module.children())


def vocabulary_size(model: Any) -> int:
    """The number of logits of a model for a token."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    size: int = model.config.get_text_config(decoder=True).vocab_size if weight is None else weight.shape[0]
    return size
