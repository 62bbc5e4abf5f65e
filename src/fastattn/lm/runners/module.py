"""`ModuleRunner`: transformers' own modules over a cache with lengths on the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._compat.attention_classes import computes_own_attention
from ..._compat.transformers import (
    attention_name,
    cache_argument,
    keeps_a_state,
    last_logits_only,
    reads_experts_on_host,
    with_cache,
)
from ...common.failures import first_line
from ...common.notice import warn_once
from .. import rope
from ..fused_ops import FusedOps, choose_fused_ops
from ..loading.loaded import Loaded
from ..mask_predicates import layer_masks, sees_only_window, without_windows
from ..runner import prefill_steps


class ModuleRunner:
    """A `Runner` over any causal language model of transformers whose attention is "fastattn".

    liger-kernel's operations may replace the model's own during the runner's calls: see `fused_ops`. Between the calls
    the model is unchanged.

    Args:
        model: a transformers model for causal language modelling on one device, or the result of `load`.
        rows: the number of sequences.
        capacity: the number of tokens of each.
        fused_ops: True: liger-kernel is required. False: it is not used. None: as the model was loaded; if that is None
            too, it is used on a GPU if it is installed.
        prefill_step: prompt tokens per forward pass. Default: `runner.PREFILL_STEP`.
        find_ops: finds the operations, as `choose_fused_ops` does.

    Raises:
        ValueError: rows or capacity is not as described; the model cannot be run this way, the text says why;
            `fused_ops` is required, and the model is not on a GPU.
        ImportError: `fused_ops` is required, and liger-kernel is not installed.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        fused_ops: bool | None = None,
        prefill_step: int | None = None,
        *,
        find_ops: Callable[[Any, bool | None], FusedOps] = choose_fused_ops,
    ) -> None:
        from ...integrations.transformers import StaticCache

        if isinstance(model, Loaded):
            fused_ops = model.fused_ops if fused_ops is None else fused_ops
            model = model.model
        why = refusal(model, rows, capacity)
        if why is not None:
            raise ValueError(f"model: {type(model).__name__} cannot be run row by row: {why}")
        self.model = model
        self.rows, self.capacity = rows, capacity
        self.device: torch.device = model.device
        self._config = cache_config(model, capacity)
        self.cache = StaticCache(self._config, batch=rows, capacity=capacity, dtype=model.dtype, device=self.device)
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        #: False if a step picks experts on the host; with `set_experts_implementation("grouped_mm")` the device picks
        #: them. Rotary modules that store the longest length read it on the host as well.
        self.capturable = not reads_experts_on_host(model) and not rope.stores_longest_length(
            model.config.get_text_config(decoder=True)
        )
        self._step = prefill_step
        self._views: dict[tuple[int, int], StaticCache] = {}
        self._last_only = last_logits_only(model)
        self._ops = find_ops(model, fused_ops)
        try:
            self._try_out()
        except Exception as error:
            if fused_ops or not self.fused_ops:
                raise
            self._ops = FusedOps()
            self._try_out()
            text = f"the model runs without liger-kernel's fused operations, which is slower: {first_line(error)}"
            warn_once(text, "fused_ops")

    @property
    def fused_ops(self) -> tuple[str, ...]:
        """The names of what liger-kernel replaces while the model runs here."""
        return self._ops.replaced

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """Appends tokens, int64 `[S]`, S >= 1, to a row. Returns the logits `[V]` that follow the last of them."""
        if ids.dim() != 1 or not ids.shape[0]:
            raise ValueError(f"ids: expected [tokens], at least one, got {list(ids.shape)}")
        cache = self._view(row, 1)
        # A model that computes logits of every position gets its last token alone: the other logits are not needed.
        count = ids.shape[0]
        steps = prefill_steps(count, self._step) if self._last_only else [*prefill_steps(count - 1, self._step), 1]
        *body, last = ids.split(steps)
        for step in body:
            self._forward(self.model.base_model, step[None], cache)
        logits: Tensor = self._forward(self.model, last[None], cache, **self._last_only).logits
        return logits[0, -1]

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Appends one token to each of the first N rows: int64 `[N]`. Returns logits `[N, V]`. A step like one that
        has run can be captured in a CUDA graph, unless the model's own code waits for the device."""
        if ids.dim() != 1 or not 1 <= ids.shape[0] <= self.rows:
            raise ValueError(f"ids: expected [rows], 1 to {self.rows} of them, got {list(ids.shape)}")
        logits: Tensor = self._forward(self.model, ids[:, None], self._view(0, ids.shape[0])).logits
        return logits[:, -1]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Empties a row for another sequence."""
        self.cache.reset(row)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Moves the content of row `source` to row `target`. `source` is empty afterwards."""
        self.cache.move(source, target)

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Raises ValueError unless the model's own code runs with lengths that are on the device alone."""
        from ...integrations.transformers import StaticCache

        cache = StaticCache(self._config, batch=min(self.rows, 2), capacity=24, device=self.device)
        cache.forget()
        ids = torch.zeros(cache.max_batch_size, 1, dtype=torch.long, device=self.device)
        try:
            # Triton compiles another kernel for a length that is a multiple of 16: here, not with the first prompt.
            for length in (3, 16) if self.fused_ops else (3,):
                self._forward(self.model, ids[:1].expand(1, length), cache.view(0, 1))
            self._forward(self.model, ids, cache)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            name = type(self.model).__name__
            raise ValueError(f"model: {name} cannot be run with lengths on the device: {error}") from error

    def _view(self, first: int, count: int) -> Any:
        view = self._views.get((first, count))
        if view is None:
            view = self._views[first, count] = self.cache.view(first, count)
        return view

    def _forward(self, module: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
        positions = cache.positions(ids.shape[1])
        with self._ops:
            options |= with_cache(module, cache)
            return module(input_ids=ids, position_ids=positions, use_cache=True, **options)


def refusal(model: Any, rows: int, capacity: int) -> str | None:
    """Why a model cannot be run by a `ModuleRunner`, or None. (Of a state that is no keys, `StaticCache` tells.)"""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if not model.can_generate() or model.get_output_embeddings() is None:
        return "it makes no logits of a next token"
    if keeps_a_state(model):
        return "it keeps a recurrent state"
    if cache_argument(model) is None:
        return "its forward takes no cache of keys and values (past_key_values)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    if attention_name(config) != "fastattn":
        return f'its attn_implementation is "{attention_name(config)}": load it with "fastattn"'
    if computes_own_attention(model, config):
        return "its layers compute attention themselves"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "it is spread over several devices"
    limit = rope.length_independent_up_to(config)
    if limit is not None and capacity > limit:
        types = {settings["rope_type"] for settings in rope.rope_settings(config)} - rope.LENGTH_INDEPENDENT
        return f'its RoPE ("{", ".join(sorted(types))}") depends on the longest row beyond {limit} tokens'
    positions = getattr(config, "max_position_embeddings", None)
    if not rope.rope_settings(config) and positions is not None and capacity > positions:
        return f"it has a table of {positions} positions, expected a capacity of no more"
    if rows > 1 and getattr(config, "attn_temperature_tuning", None) and config.model_type == "llama4_text":
        return "it scales queries by one position for all rows (attn_temperature_tuning)"
    return None


def cache_config(model: Any, capacity: int) -> Any:
    """The config for the cache of a model: its own if layers whose cache holds a window see no more than the window,
    else one whose layers keep all keys."""
    from ...integrations.transformers import StaticCache

    cache = StaticCache(model.config, batch=1, capacity=capacity, device="meta")
    windows = cache.windows
    if not windows:
        return model.config
    masks = layer_masks(model)
    if all(sees_only_window(masks.get(index), window) for index, window in windows.items()):
        return model.config
    return without_windows(model.config)
