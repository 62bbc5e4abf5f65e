"""The runner for models that no other runner takes: a cache for each row, and one row after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat.transformers import last_logits_only, with_cache
from .runner import prefill_steps


class LoopRunner:
    """A `Runner` over any transformers model for causal language modelling, with a DynamicCache for each row.

    A decode step is one forward pass per row, and the caches grow, so that steps cannot be captured.
    """

    capturable = False

    def __init__(self, model: Any, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.device: torch.device = model.device
        self._model = model
        self._one = last_logits_only(model)
        self._caches = [self._empty() for _ in range(rows)]

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        cache, ids = self._caches[row], ids[None]
        # Where logits of every position are made, the last step is the last token alone: nobody reads the others.
        steps = prefill_steps(ids.shape[1]) if self._one else [*prefill_steps(ids.shape[1] - 1), 1]
        *body, last = ids.split(steps, 1)
        base = self._model.base_model
        for step in body:
            base(input_ids=step, **with_cache(base, cache), use_cache=True)
        return self._forward(cache, last)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        return torch.stack([self._step(row, one) for row, one in enumerate(ids.split(1))])

    def clear(self, row: int) -> None:
        self._caches[row] = self._empty()

    def move(self, source: int, target: int) -> None:
        self._caches[target] = self._caches[source]
        self.clear(source)

    def _step(self, row: int, ids: Tensor) -> Tensor:
        cache = self._caches[row]
        if cache.get_seq_length() >= self.capacity:  # beyond it a model may have no position embedding
            return torch.zeros(self.vocab_size, dtype=self._model.dtype, device=self.device)
        return self._forward(cache, ids[None])

    def _forward(self, cache: Any, ids: Tensor) -> Tensor:
        """The logits `[V]` after ids `[1, S]`."""
        return self._model(input_ids=ids, **with_cache(self._model, cache), use_cache=True, **self._one).logits[0, -1]

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)
