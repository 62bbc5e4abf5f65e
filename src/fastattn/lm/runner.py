"""What the engine asks of a model: memory for a few sequences, the prefill of one, and a decode step of all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PREFILL_STEP = 2048  #: prompt tokens per forward pass: enough to fill a GPU, and activations stay small


def prefill_steps(tokens: int, step: int | None = None) -> list[int]:
    """How many tokens of a prompt to put through at a time: `step`, the last time up to a quarter more, as a short step
    would read all weights anew. Default: `PREFILL_STEP`. [] for none."""
    step = step or PREFILL_STEP
    count = max(1, -(-(tokens - step // 4) // step))
    return [step] * (count - 1) + [tokens - step * (count - 1)] if tokens else []


class Runner(Protocol):
    """A language model with a cache of `rows` sequences of at most `capacity` tokens each.

    A row's length lives on the device. Rows are independent: what one holds never reaches another. All tensors are on
    `device`; nothing here waits for the device.
    """

    rows: int
    capacity: int
    vocab_size: int
    device: torch.device
    capturable: bool  #: whether `decode` may be captured in a CUDA graph

    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """Appends tokens, int64 `[S]`, to a row. Returns the logits `[V]` that follow the last of them.

        Any S that fits, in steps inside: memory does not grow with S squared. Never captured in a CUDA graph.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Appends one token to each of the first N rows: int64 `[N]`. Returns logits `[N, V]`.

        Where it is `capturable`, a captured step is replayed at other lengths: it depends on the host only through N.
        The step of a row that is full or that nobody uses must be harmless to the others.
        """
        ...

    def clear(self, row: int) -> None:
        """Empties a row, for another sequence."""
        ...

    def move(self, source: int, target: int) -> None:
        """Makes row `target` what row `source` is; `source` is empty afterwards."""
        ...
