"""The `Runner` protocol: what the engine needs of a model that runs several sequences."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PREFILL_STEP = 2048  #: prompt tokens per forward pass: enough to fill a GPU, and activations stay small


def prefill_steps(tokens: int, step: int | None = None) -> list[int]:
    """The numbers of prompt tokens of each forward pass; [] for no tokens.

    Each is `step` (default: `PREFILL_STEP`). The last may be up to a quarter longer, because a short pass would read
    all weights once more.
    """
    step = step or PREFILL_STEP
    count = max(1, -(-(tokens - step // 4) // step))
    return [step] * (count - 1) + [tokens - step * (count - 1)] if tokens else []


class Runner(Protocol):
    """A language model with a cache of `rows` sequences of at most `capacity` tokens each.

    The length of each row is on the device. Rows are independent: the content of one never affects another. All
    tensors are on `device`. No method waits for the device.
    """

    rows: int
    capacity: int
    vocab_size: int
    device: torch.device
    capturable: bool  #: whether `decode` may be captured in a CUDA graph

    def prefill(self, row: int, ids: Tensor) -> Tensor:
        """Appends tokens, int64 `[S]`, to a row. Returns the logits `[V]` that follow the last of them.

        Any S that fits is allowed. The runner splits it into steps, so that memory does not grow with S squared. Never
        captured in a CUDA graph.
        """
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Appends one token to each of the first N rows: int64 `[N]`. Returns logits `[N, V]`.

        If the runner is `capturable`, a captured step is replayed at other lengths: on the host it may depend on N
        alone. A step of a full or unused row must not affect other rows.
        """
        ...

    def clear(self, row: int) -> None:
        """Empties a row for another sequence."""
        ...

    def move(self, source: int, target: int) -> None:
        """Moves the content of row `source` to row `target`. `source` is empty afterwards."""
        ...
