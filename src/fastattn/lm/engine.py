"""The generation engine: many requests through one runner, as many at a time as it has rows.

A request that is done frees its row at once and the next one that waits gets it (continuous batching). Each prompt is
prefilled by itself, so that prompts of different lengths cost nothing extra. The rows in use are always the first ones:
a decode step runs on as few rows as there is work for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from .checks import check_flag, check_ids, check_int, check_sequence
from .constraints import Constraints
from .load import Loaded
from .parallel import Ranks
from .runner import Runner
from .runners import end_tokens, longest, make_runner
from .sampling import Chooser, Sampling, choose
from .step import DecodeStep

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """A token of a request."""

    request: int  #: which prompt it continues, counted from 0
    token: int
    finish_reason: str | None = None  #: on the last one: "stop" (the token ends the text) or "length"


@dataclass(eq=False)
class _Request:
    number: int
    prompt: list[int]
    limit: int  #: tokens to generate at most
    sampling: Sampling
    chooser: Chooser | None = None
    chosen: int = 0  #: tokens, those included that the host has not seen yet
    cancelled: bool = False


_Chosen = tuple[int, _Request, bool]  #: a row, whose it is, and whether its last token is the last one allowed


class Engine:
    """Generates tokens with a runner, for one list of prompts at a time.

    On a GPU the host looks at a step's tokens when the next step is already queued, so that the GPU never waits for
    it; a row that has ended meanwhile has run one step too many, of which nothing is seen.
    """

    def __init__(
        self,
        runner: Runner,
        eos_ids: Collection[int] = (),
        *,
        capture: bool | None = None,
        ahead: bool | None = None,
        ranks: Ranks | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        """
        Args:
            runner: `make_runner` finds one for a model. The engine decides over its rows.
            eos_ids: tokens that end a text, each >= 0.
            capture: whether decode steps are captured in CUDA graphs. Default: on a GPU, if the runner allows it.
            ahead: whether a step is queued before the last one's tokens are looked at. Default: on a GPU.
            ranks: that run the model together, each with an engine like this one and the same calls (tensor parallel).
            constraints: of the choice of tokens, in every request. Default: none.

        Raises ValueError for an argument that is not as described.
        """
        eos_ids = check_ids("eos_ids", eos_ids)
        for name, value in (("capture", capture), ("ahead", ahead)):
            check_flag(name, value)
        if any(token < 0 for token in eos_ids):
            raise ValueError(f"eos_ids: expected token ids, 0 or more, got {min(eos_ids)}")
        on_gpu = runner.device.type == "cuda"
        self.runner = runner
        self.eos_ids = frozenset(eos_ids)
        self._step = DecodeStep(runner, capture, ranks)
        self._ranks = ranks
        self._constraints = constraints
        self._ahead = on_gpu if ahead is None else ahead
        self._waiting: deque[_Request] = deque()
        self._rows: list[_Request | None] = []  #: of the first rows; None: the request is done
        self._requests: list[_Request] = []
        self._running = False
        self._seen = torch.empty(runner.rows, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._stream: Any = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int] = 256,
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> Generator[Event, None, None]:
        """Continues the prompts; requests begin in their order, and their events come as they come.

        Args:
            prompts: token ids, at least one each.
            max_tokens: at most so many tokens, >= 1; for all, or for each. A row's capacity may end a text earlier.
            sampling: for all (request i then has the seed `seed + i`), or for each. Default: greedy.

        Returns:
            An iterator. Closing it before its end, or an error within, empties the rows. What can be prepared, such as
            capturing decode steps, is done before this returns.

        Raises:
            ValueError: an argument is not as described; a prompt does not fit, or has ids the model does not know.
            RuntimeError: another iterator of this engine is not done yet.
        """
        if self._running:
            raise RuntimeError("this engine is generating: expected the iterator before to be exhausted or closed")
        requests = self._check(prompts, max_tokens, sampling)
        if self._copied is not None:
            before, self._stream = self._stream, torch.cuda.current_stream(self.runner.device)
            if before is not None:
                self._stream.wait_stream(before)  # the rows and the copies are the same
        if any(request.limit > 1 for request in requests):
            with self._queueing():
                self._step.prepare(min(len(requests), self.runner.rows))
        return self._events(requests)

    def cancel(self, request: int) -> None:
        """Ends a request of the iterator that runs: no event of it follows, and its row is free for another.

        Raises ValueError when there is no such request.
        """
        if isinstance(request, bool) or not isinstance(request, int) or not 0 <= request < len(self._requests):
            raise ValueError(f"request: expected the number of one of {len(self._requests)} that run, got {request!r}")
        found = self._requests[request]
        found.cancelled = True
        if found in self._waiting:
            self._waiting.remove(found)

    def _check(self, prompts: Any, max_tokens: Any, sampling: Any) -> list[_Request]:
        prompts = check_sequence("prompts", prompts, "prompts, token ids each")
        limits = [check_int("max_tokens", limit) for limit in _each("max_tokens", max_tokens, len(prompts))]
        if isinstance(sampling, (Sampling, type(None))):
            sampling = [(sampling or Sampling()).for_request(i) for i in range(len(prompts))]
        requests = []
        for i, (prompt, limit, how) in enumerate(
            zip(prompts, limits, _each("sampling", sampling, len(prompts)), strict=True)
        ):
            ids = check_ids(f"prompts[{i}]", prompt)
            if not isinstance(how, Sampling):
                raise ValueError(f"sampling: expected Sampling, one for all or one for each, got {how!r:.80}")
            if not ids:
                raise ValueError(f"prompts[{i}]: expected at least one token")
            if len(ids) >= self.runner.capacity:
                room = self.runner.capacity
                raise ValueError(f"prompts[{i}]: expected fewer tokens than a row's {room}, got {len(ids)}")
            if not 0 <= min(ids) <= max(ids) < self.runner.vocab_size:
                most = self.runner.vocab_size - 1
                raise ValueError(f"prompts[{i}]: expected token ids from 0 to {most}, got {min(ids)} to {max(ids)}")
            requests.append(_Request(i, ids, min(limit, self.runner.capacity - len(ids)), how))
        return requests

    def _events(self, requests: list[_Request]) -> Generator[Event, None, None]:
        if self._running:
            raise RuntimeError("this engine is generating: expected the iterator before to be exhausted or closed")
        self._running = True
        self._requests = requests
        self._waiting.extend(requests)
        try:
            while self._waiting or self._rows:
                chosen = self._fill()
                if not self._ahead:
                    yield from self._tell(chosen)
                self._decode()
                if self._ahead:
                    yield from self._tell(chosen)
        finally:
            self._running = False
            self._reset()

    def _tell(self, chosen: list[_Chosen]) -> Generator[Event, None, None]:
        for event in self._look(chosen):
            if not self._requests[event.request].cancelled:  # maybe by whoever got the event before
                yield event

    @contextmanager
    def _queueing(self) -> Generator[None, None, None]:
        """All is queued on the stream that was current when the generation began, whatever is current now."""
        with torch.inference_mode(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _decode(self) -> None:
        """Queues a step of the requests that are not at their limit, if there are any."""
        with self._queueing():
            for row, request in enumerate(self._rows):
                if request and (request.cancelled or request.chosen == request.limit):
                    self._free(row)
            if not self._waiting:
                self._compact()  # else one of them gets the row, after this step
            if any(self._rows):
                logits = self._step(len(self._rows))
                choosers = [request.chooser if request else None for request in self._rows]
                choose(choosers, logits, self._step.ids)
                for request in filter(None, self._rows):
                    request.chosen += 1

    def _fill(self) -> list[_Chosen]:
        """Prefills what there is a free row for, and queues the way of each row's last token to the host."""
        with self._queueing():
            for row, request in enumerate(self._rows):
                if request and request.cancelled:
                    self._free(row)
            for row in range(self.runner.rows):
                if not self._waiting:
                    break
                if row == len(self._rows):
                    self._rows.append(None)
                if self._rows[row] is None:
                    self._begin(row, self._waiting.popleft())
            self._compact()
            count = len(self._rows)
            if self._ranks is not None and count:  # a token that differed would part the ranks for good
                self._ranks.share(self._step.ids[:count])
            self._seen[:count].copy_(self._step.ids[:count], non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            return [
                (row, request, request.chosen == request.limit) for row, request in enumerate(self._rows) if request
            ]

    def _begin(self, row: int, request: _Request) -> None:
        """Prefills a request's prompt and chooses its first token."""
        self.runner.clear(row)  # it may have run along in steps of others
        prompt = torch.tensor(request.prompt)
        if self._copied is not None:
            prompt = prompt.pin_memory().to(self.runner.device, non_blocking=True)
        logits, token = self.runner.prefill(row, prompt), self._step.ids[row : row + 1]
        token.copy_(logits.argmax(-1))
        sampling = self._constrained(request)
        if not sampling.is_greedy:
            request.chooser = Chooser(sampling, prompt, request.limit)
            choose([request.chooser], logits[None], token)
        request.chosen = 1
        self._rows[row] = request

    def _constrained(self, request: _Request) -> Sampling:
        """How a request's tokens are chosen, with what the model asks of all of them."""
        sampling = request.sampling
        if self._constraints is None:
            return sampling
        found = self._constraints.of(
            len(request.prompt), request.limit, self.runner.device, sampling.repetition_penalty is not None
        )
        return replace(sampling, processors=(*found, *sampling.processors)) if found else sampling

    def _look(self, chosen: list[_Chosen]) -> list[Event]:
        """Waits for the tokens on their way to the host, for nothing else. Frees the rows of texts that they end."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens = self._seen.tolist()
        events = []
        with self._queueing():
            for row, request, at_limit in chosen:
                is_end = tokens[row] in self.eos_ids
                events.append(Event(request.number, tokens[row], "stop" if is_end else "length" if at_limit else None))
                if is_end and request in self._rows:  # by now maybe in another row
                    self._free(self._rows.index(request))
        return events

    def _free(self, row: int) -> None:
        self._rows[row] = None
        self.runner.clear(row)

    def _compact(self) -> None:
        """Moves the last rows into the gaps before them."""
        while None in self._rows:
            request, last = self._rows.pop(), len(self._rows)
            if request is not None:
                row = self._rows.index(None)
                self.runner.move(last, row)
                self._step.ids[row : row + 1].copy_(self._step.ids[last : last + 1])
                self._rows[row] = request

    def _reset(self) -> None:
        self._waiting.clear()
        self._rows.clear()
        self._requests = []
        with self._queueing():
            for row in range(self.runner.rows):
                self.runner.clear(row)


def make_engine(loaded: Loaded, rows: int, tokens: int, *, prefill_step: int | None = None) -> Engine:
    """An engine for sequences of at most so many tokens, prompt and text together, as far as the model allows.

    Its rows have a multiple of 256 tokens, so that there are few different engines. The tokens that end a text are
    those of the model's generation_config, and the tokenizer's eos_token. What generation_config asks of every text
    beside sampling (tokens that may not come, a least length, a repetition penalty) is done; what cannot be is named in
    a warning. The model is not to be changed (adapters, hooks, dtype, device) while the engine lives.

    Args:
        loaded: from `load`.
        rows: how many sequences run at a time, >= 1.
        tokens: of a sequence, >= 1.
        prefill_step: tokens of a prompt that go through the model at a time, about; >= 1. Default:
            `runner.PREFILL_STEP`.

    Raises ValueError for an argument that is not as described, and for a model that makes no next tokens; see
    `make_runner`.
    """
    rows, tokens = check_int("rows", rows), check_int("tokens", tokens)
    eos_ids = end_tokens(loaded)
    constraints = Constraints(getattr(loaded.model, "generation_config", None), eos_ids)
    capacity = min(-(-tokens // 256) * 256, longest(loaded))
    runner = make_runner(loaded, rows, capacity, prefill_step=prefill_step)
    return Engine(runner, eos_ids, ranks=loaded.ranks, constraints=constraints)


def _each(name: str, value: T | Sequence[T], count: int) -> Sequence[T]:
    """A value for each of so many requests."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{name}: expected one for all prompts or {count}, one for each, got {len(value)}")
    return value
