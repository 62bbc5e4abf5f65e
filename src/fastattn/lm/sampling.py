"""How the next token is chosen: greedily, or drawn. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. The default is greedy: the likeliest token, always.

    In the order in which they apply: `repetition_penalty`, `processors`, then, where tokens are drawn, `temperature`,
    `top_k`, `top_p`, `min_p`: transformers' own, in transformers' order. Raises ValueError, naming the field, for a
    number out of its range.
    """

    temperature: float = 0.0  #: above 0: tokens are drawn, from probabilities at this temperature
    top_p: float | None = None  #: draw from the likeliest tokens that together have this probability, in (0, 1]
    top_k: int | None = None  #: draw from this many of the likeliest tokens, >= 1
    min_p: float | None = None  #: draw from tokens with at least this part of the best one's probability, in [0, 1]
    repetition_penalty: float | None = None  #: above 0; above 1 makes what the row already holds less likely
    seed: int | None = None  #: of what is drawn; None: another each time
    #: transformers' LogitsProcessors: `f(ids [1, tokens so far], logits [1, V]) -> logits`, on the model's device. One
    #: that reads a value on the host makes the GPU wait for it; one with a memory of its own serves one request only.
    processors: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "processors", tuple(self.processors))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_k is not None and (self.top_k < 1 or self.top_k != int(self.top_k)):
            raise ValueError(f"top_k: expected a whole number, at least 1, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number in [0, 1], got {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 or more, below 2**63, got {self.seed}")
        for name in ("top_p", "top_k", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name}: only with a temperature above 0, which makes it draw")

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is the largest logit, as it comes from the model."""
        return self.temperature == 0 and not self.looks_back

    @property
    def looks_back(self) -> bool:
        """Whether a choice depends on the tokens before it other than through the model."""
        return self.repetition_penalty is not None or bool(self.processors)

    def for_request(self, number: int) -> Sampling:
        """The same, with a seed of its own: equal prompts of a batch shall not get equal texts."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**63)


class Chooser:
    """Chooses the tokens of one request.

    What it draws comes from a generator of its own, so that it does not depend on what else is in the batch.
    """

    def __init__(self, sampling: Sampling, prompt: Tensor, most: int) -> None:
        """prompt: int64 `[P]` on the device; most: how many tokens will be chosen at most."""
        self.processors = _processors(sampling)
        self.history: Tensor | None = None
        if sampling.looks_back:
            self.history = torch.cat([prompt, prompt.new_empty(most)])[None]
            self.known = len(prompt)
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self.generator = torch.Generator(prompt.device)
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)
        #: Rows of equal keys, side by side, are chosen in one go.
        self.key: Any = id(self) if sampling.looks_back else _warping(sampling)

    def remember(self, token: Tensor) -> None:
        """Adds the token chosen, int64 `[1]`, to the history."""
        if self.history is not None:
            self.history[0, self.known : self.known + 1] = token
            self.known += 1


def choose(choosers: Sequence[Chooser | None], logits: Tensor, ids: Tensor) -> None:
    """Writes the tokens that follow into ids, where they are not the greedy choices that are there.

    Args:
        choosers: of the first n rows; None: the row is greedy, or nobody's.
        logits: `[N, V]`, N >= n, floating.
        ids: int64 `[N]`, the likeliest token of each row.
    """
    begin = 0
    for key, run in groupby(choosers, key=lambda chooser: chooser and chooser.key):
        found: list[Any] = list(run)
        end = begin + len(found)
        if key is not None:
            ids[begin:end] = _choose(found, logits[begin:end].float(), ids[begin:end])
            for chooser, token in zip(found, ids[begin:end].split(1)):
                chooser.remember(token)
        begin = end


def _choose(alike: list[Any], scores: Tensor, ids: Tensor) -> Tensor:
    """The next tokens, int64 `[n]`, of choosers that differ in their generators only. scores: float32 `[n, V]`."""
    first = alike[0]
    before = ids[:, None] if first.history is None else first.history[:, : first.known]
    scores = first.processors(before, scores)
    if first.generator is None:
        return scores.argmax(-1)
    # The least of exponential variables with rates p is i with probability p_i. `torch.multinomial` does the same, but
    # looks at the probabilities on the host first.
    waits = torch.empty_like(scores)
    for chooser, row in zip(alike, waits):
        row.exponential_(generator=chooser.generator)
    return (scores.softmax(-1) / waits).argmax(-1)


def _warping(sampling: Sampling) -> tuple[Any, ...]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def _processors(sampling: Sampling) -> Any:
    """A LogitsProcessorList: what transformers' generate makes of the same arguments."""
    import transformers as known

    found = known.LogitsProcessorList()
    if sampling.repetition_penalty is not None:
        found.append(known.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    found.extend(sampling.processors)
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            found.append(known.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            found.append(known.TopKLogitsWarper(int(sampling.top_k)))
        if sampling.top_p is not None and sampling.top_p < 1:
            found.append(known.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            found.append(known.MinPLogitsWarper(sampling.min_p))
    return found
