"""Sampling: the choice of the next token, greedy or drawn at random. The host never waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_number, check_sequence

#: Below this temperature the float32 probabilities of tokens whose logits differ by 1e-4 are 1 and 0, and logits
#: divided by it may be infinite: the likeliest token is chosen.
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a request. The default is greedy: always the likeliest token.

    They apply in transformers' order, by transformers' own code: `repetition_penalty`, `processors`, then, if tokens
    are drawn, `temperature`, `top_k`, `top_p`, `min_p`. Raises ValueError, naming the field, for a number out of range.
    """

    temperature: float = 0.0  #: from 1e-6 on tokens are drawn; below it the likeliest one is chosen
    top_p: float | None = None  #: draw from the likeliest tokens with this total probability, in (0, 1]; 1: off
    top_k: int | None = None  #: draw from this many of the likeliest tokens; 0: off
    min_p: float | None = None  #: draw from tokens of at least this fraction of the largest probability, in [0, 1]
    #: > 0; above 1 makes tokens of the text so far less likely; 1: off; None: that of generation_config
    repetition_penalty: float | None = None
    seed: int | None = None  #: of the random numbers; None: another one each time
    #: transformers' LogitsProcessors: `f(ids [1, tokens so far], logits [1, V]) -> logits`, on the model's device. One
    #: that reads a value on the host makes the GPU wait; one with a state can serve one request only.
    processors: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        processors = tuple(check_sequence("processors", self.processors, "functions of ids and logits"))
        for processor in processors:
            if not callable(processor):
                raise ValueError(f"processors: expected functions of ids and logits, got {processor!r}")
        found: dict[str, Any] = {"processors": processors}
        check_number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "of 0 or more")
        if self.top_p is not None:
            found["top_p"] = _none_if(1, check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "in (0, 1]"))
        if self.top_k is not None:
            found["top_k"] = _none_if(0, check_int("top_k", self.top_k, 0))
        if self.min_p is not None:
            found["min_p"] = _none_if(0, check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "in [0, 1]"))
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
        """Whether tokens are drawn at random."""
        return self.temperature >= LOWEST_TEMPERATURE

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is the largest of the model's logits."""
        return not self.draws and not self.uses_history

    @property
    def uses_history(self) -> bool:
        """Whether a choice depends on earlier tokens other than through the model."""
        return self.repetition_penalty not in (None, 1) or bool(self.processors)

    def for_request(self, number: int) -> Sampling:
        """The same with a seed for the request of that number, so that equal prompts of a batch get different texts."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**63)


def _none_if(off: float, value: Any) -> Any:
    """The value, or None if it is the one that means "off"."""
    return None if value == off else value


class Chooser:
    """Chooses the tokens of one request.

    It has its own random generator, so that its tokens do not depend on the rest of the batch.
    """

    def __init__(self, sampling: Sampling, prompt: Tensor, most: int) -> None:
        """prompt: int64 `[P]` on the device. most: the largest number of tokens to choose."""
        self.processors = _processors(sampling)
        self.history: Tensor | None = None
        if sampling.uses_history:
            self.history = torch.cat([prompt, prompt.new_empty(most)])[None]
            self.known = len(prompt)
        self.generator: torch.Generator | None = None
        if sampling.draws:
            self.generator = torch.Generator(prompt.device)
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed)
        #: Adjacent rows with equal keys are chosen together.
        self.key: Any = id(self) if sampling.uses_history else _warping(sampling)

    def append(self, token: Tensor) -> None:
        """Appends the chosen token, int64 `[1]`, to the history."""
        if self.history is not None:
            self.history[0, self.known : self.known + 1] = token
            self.known += 1


def choose(choosers: Sequence[Chooser | None], logits: Tensor, ids: Tensor) -> None:
    """Writes the next tokens of rows that are not greedy into ids.

    Args:
        choosers: of the first n rows; None: the row is greedy or unused.
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
                chooser.append(token)
        begin = end


def _choose(group: list[Any], scores: Tensor, ids: Tensor) -> Tensor:
    """The next tokens, int64 `[n]`, of choosers that differ in their generators only. scores: float32 `[n, V]`."""
    first = group[0]
    before = ids[:, None] if first.history is None else first.history[:, : first.known]
    scores = first.processors(before, scores)
    if first.generator is None:
        return scores.argmax(-1)
    # The smallest of exponential variables with rates p is the i-th with probability p_i. `torch.multinomial` does the
    # same, but reads the probabilities on the host first.
    times = torch.empty_like(scores)
    for chooser, row in zip(group, times):
        row.exponential_(generator=chooser.generator)
    return (scores.softmax(-1) / times).argmax(-1)


def _warping(sampling: Sampling) -> tuple[Any, ...]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def _processors(sampling: Sampling) -> Any:
    """The LogitsProcessorList that transformers' `generate` makes of the same arguments."""
    import transformers

    found = transformers.LogitsProcessorList()
    if sampling.repetition_penalty is not None and sampling.repetition_penalty != 1:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    found.extend(sampling.processors)
    if sampling.draws:
        if sampling.temperature != 1:
            found.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            found.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            found.append(transformers.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p is not None:
            found.append(transformers.MinPLogitsWarper(sampling.min_p))
    return found
