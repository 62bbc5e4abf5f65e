"""The requests of an engine: their arguments checked, their state, and the events they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import check_ids, check_int, check_sequence
from ..runner import Runner
from .sampling import Chooser, Sampling


@dataclass(frozen=True)
class Event:
    """A token of a request."""

    request: int  #: the index of the prompt that it continues
    token: int
    finish_reason: str | None = None  #: on the last one: "stop" (the token ends the text) or "length"


@dataclass(eq=False)
class Request:
    """A prompt to continue, and how far it is."""

    number: int
    prompt: list[int]
    limit: int  #: the largest number of new tokens
    sampling: Sampling
    chooser: Chooser | None = None  #: None: greedy
    chosen: int = 0  #: new tokens, including those that the host has not read yet
    cancelled: bool = False

    @property
    def is_at_limit(self) -> bool:
        return self.chosen == self.limit


def make_requests(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None,
) -> list[Request]:
    """The requests for `Engine.generate`'s arguments. Raises ValueError as it does."""
    prompts = check_sequence("prompts", prompts, "prompts, token ids each")
    limits = [check_int("max_tokens", limit) for limit in _one_each("max_tokens", max_tokens, len(prompts))]
    if isinstance(sampling, (Sampling, type(None))):
        sampling = [(sampling or Sampling()).for_request(i) for i in range(len(prompts))]
    requests = []
    for i, (prompt, limit, one) in enumerate(
        zip(prompts, limits, _one_each("sampling", sampling, len(prompts)), strict=True)
    ):
        ids = check_ids(f"prompts[{i}]", prompt)
        if not isinstance(one, Sampling):
            raise ValueError(f"sampling: expected Sampling, one for all or one for each, got {one!r:.80}")
        if not ids:
            raise ValueError(f"prompts[{i}]: expected at least one token")
        if len(ids) >= runner.capacity:
            raise ValueError(f"prompts[{i}]: expected fewer tokens than a row's {runner.capacity}, got {len(ids)}")
        if not 0 <= min(ids) <= max(ids) < runner.vocab_size:
            last = runner.vocab_size - 1
            raise ValueError(f"prompts[{i}]: expected token ids from 0 to {last}, got {min(ids)} to {max(ids)}")
        requests.append(Request(i, ids, min(limit, runner.capacity - len(ids)), one))
    return requests


def _one_each(name: str, value: Any, count: int) -> Sequence[Any]:
    """A value for each of so many requests."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected one for all prompts or {count}, one for each, got {len(value)}")
    return value
