"""`RecomputeRunner`: a forward pass over the whole text for every token, for models without a state to pass on."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..._compat.transformers import last_logits_only
from .per_row import vocabulary_size


class RecomputeRunner:
    """A `Runner` for models without a cache or another state that a forward returns and takes.

    Every token is a forward pass over the whole row. This is right for every causal model, and slower the longer the
    text is.
    """

    capturable = False

    def __init__(self, model: Any, rows: int, capacity: int, prefill_step: int | None = None) -> None:
        self.rows, self.capacity = rows, capacity
        self.vocab_size = vocabulary_size(model)
        self.device: torch.device = model.device
        self._model = model
        self._options: dict[str, Any] = {**last_logits_only(model)}
        if "use_cache" in signature(model.forward).parameters:
            self._options["use_cache"] = False
        self._ids: list[Tensor] = [self._no_ids()] * rows

    @torch.inference_mode()
    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """See `Runner`."""
        self._ids[row] = torch.cat([self._ids[row], ids])
        logits: Tensor = self._model(input_ids=self._ids[row][None], **self._options).logits
        return logits[0, -1]

    def decode(self, ids: Tensor) -> Tensor:
        """See `Runner`."""
        full = torch.zeros(self.vocab_size, dtype=self._model.dtype, device=self.device)
        return torch.stack(
            [full if len(self._ids[row]) >= self.capacity else self.prefill(row, one)
             for row, one in enumerate(ids.split(1))]
        )  # fmt: skip

    def clear(self, row: int) -> None:
        """See `Runner`."""
        self._ids[row] = self._no_ids()

    def move(self, source: int, target: int) -> None:
        """See `Runner`."""
        if source != target:
            self._ids[target] = self._ids[source]
            self.clear(source)

    def _no_ids(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self.device)
