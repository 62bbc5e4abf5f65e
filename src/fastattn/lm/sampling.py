"""How the next token is chosen: greedily, or drawn. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .checks import check_int, check_number, check_sequence

#: Below it float32 probabilities of tokens whose logits differ by 1e-4 are 1 and 0, and then logits divided by it are
#: no longer finite: the likeliest token is taken.
COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. The default is greedy: the likeliest token, always.

    In the order in which they apply: `repetition_penalty`, `processors`, then, where tokens are drawn, `temperature`,
    `top_k`, `top_p`, `min_p`: transformers' own, in transformers' order. Raises ValueError, naming the field, for a
    number out of its range.
    """

    temperature: float = 0.0  #: from 1e-6 on: tokens are drawn, from probabilities at this temperature
    top_p: float | None = None  #: draw from the likeliest tokens that together have this probability, in (0, 1]; 1: off
    top_k: int | None = None  #: draw from this many of the likeliest tokens; 0: off
    min_p: float | None = None  #: draw from tokens with at least this part of the best one's probability, in [0, 1]
    #: above 0; above 1 makes what the row already holds less likely; 1: off; None: as generation_config says
    repetition_penalty: float | None = None
    seed: int | None = None  #: of what is drawn; None: another each time
    #: transformers' LogitsProcessors: `f(ids [1, tokens so far], logits [1, V]) -> logits`, on the model's device. One
    #: that reads a value on the host makes the GPU wait for it; one with a memory of its own serves one request only.
    processors: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        processors = tuple(check_sequence("processors", self.processors, "functions of ids and logits"))
        for processor in processors:
            if not callable(processor):
                raise ValueError(f"processors: expected functions of ids and logits, got {processor!r}")
        found: dict[str, Any] = {"processors": processors}
        check_number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "of 0 or more")
        if self.top_p is not None:
            found["top_p"] = _unless(1, check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "in (0, 1]"))
        if self.top_k is not None:
            found["top_k"] = _unless(0, check_int("top_k", self.top_k, 0))
        if self.min_p is not None:
            found["min_p"] = _unless(0, check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "in [0, 1]"))
        if self.repetition_penalty is not None:
            check_number("repetition_penalty", self.repetition_penalty, lambda x: 0 < x < math.inf, "above 0")
        if self.seed is not None:
            found["seed"] = check_int("seed", self.seed, 0, 2**63 - 1)
        for name, value in found.items():
            object.__setattr__(self, name, value)
        for name in ("top_p", "top_k", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name}: only with a temperature above 0, which makes it draw")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn: the temperature is not so low that only the best one can come."""
        return self.temperature >= COLDEST

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is the largest logit, as it comes from the model."""
        return not self.draws and not self.looks_back

    @property
    def looks_back(self) -> bool:
        """Whether a choice depends on the tokens before it other than through the model."""
        return self.repetition_penalty not in (None, 1) or bool(self.processors)

    def for_request(self, number: int) -> Sampling:
        """The same, with a seed of its own: equal prompts of a batch shall not get equal texts."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**63)


def _unless(off: float, value: Any) -> Any:
    """None for the value that means "off"."""
    return None if value == off else value


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
        if sampling.draws:
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
    if sampling.repetition_penalty is not None and sampling.repetition_penalty != 1:
        found.append(known.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    found.extend(sampling.processors)
    if sampling.draws:
        if sampling.temperature != 1:
            found.append(known.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            found.append(known.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            found.append(known.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            found.append(known.MinPLogitsWarper(sampling.min_p))
    return found
