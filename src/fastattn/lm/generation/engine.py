"""The generation engine: continuous batching of requests over the rows of one runner.

A request that ends frees its row at once, and the next waiting request gets it. Each prompt is prefilled by itself, so
that prompts of different lengths need no padding. The rows in use are always the first ones, so that a decode step runs
on no more rows than there are requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..checks import check_flag, check_ids, check_int
from ..loading.loaded import Loaded, end_tokens, max_length
from ..parallel import Ranks
from ..runner import Runner
from ..runners.select import make_runner
from .constraints import Constraints
from .decode_step import DecodeStep, Recorder
from .requests import Event as Event
from .requests import Request, make_requests
from .sampling import Chooser, Sampling, choose

_Chosen = tuple[int, Request, bool]  #: a row, its request, and whether its last token is the last one allowed


class Engine:
    """Generates tokens with a runner, for one list of prompts at a time.

    On a GPU the host reads the tokens of a step when the next step is already queued, so that the GPU never waits for
    the host. A row whose text has ended in the meantime runs one superfluous step, whose token is dropped.
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
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            runner: from `make_runner`, for example. Its rows belong to the engine.
            eos_ids: tokens that end a text, each >= 0.
            capture: whether decode steps are captured in CUDA graphs. Default: on a GPU, if the runner allows it.
            ahead: whether a step is queued before the tokens of the last one are read. Default: on a GPU.
            ranks: the ranks that run the model together (tensor parallel). Each has an engine like this one and makes
                the same calls.
            constraints: on the choice of tokens, for every request. Default: none.
            recorder: captures decode steps. Default: in CUDA graphs.

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
        self._step = DecodeStep(runner, capture, ranks, recorder)
        self._ranks = ranks
        self._constraints = constraints
        self._ahead = on_gpu if ahead is None else ahead
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = []  #: of the first rows; None: the request is done
        self._requests: list[Request] = []
        self._running = False
        self._on_host = torch.empty(runner.rows, dtype=torch.int64, pin_memory=on_gpu)  #: the last token of each row
        self._copied = torch.cuda.Event() if on_gpu else None
        self._stream: Any = None

    @property
    def captured_buckets(self) -> list[int]:
        """The numbers of rows whose decode steps are captured."""
        return self._step.captured_buckets

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int] = 256,
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> Generator[Event, None, None]:
        """Continues the prompts. Requests begin in their order, and yield their events as they come.

        Args:
            prompts: token ids, at least one each.
            max_tokens: the largest number of new tokens, >= 1; for all, or for each. The capacity of a row may end a
                text earlier.
            sampling: for all (request i then has the seed `seed + i`), or for each. Default: greedy.

        Returns:
            An iterator. Closing it before its end, or an error in it, empties the rows. Decode steps are captured
            before this returns.

        Raises:
            ValueError: an argument is not as described; a prompt does not fit, or has ids outside of the vocabulary.
            RuntimeError: an earlier iterator of this engine is not done yet.
        """
        self._check_idle()
        requests = make_requests(self.runner, prompts, max_tokens, sampling)
        if self._copied is not None:
            before, self._stream = self._stream, torch.cuda.current_stream(self.runner.device)
            if before is not None:
                self._stream.wait_stream(before)  # both use the same rows and the same copies
        if any(request.limit > 1 for request in requests):
            with self._on_stream():
                self._step.prepare(min(len(requests), self.runner.rows))
        return self._run(requests)

    def cancel(self, request: int) -> None:
        """Ends a request of the running iterator: no event of it follows, and its row is free for another.

        Raises ValueError if there is no such request.
        """
        if isinstance(request, bool) or not isinstance(request, int) or not 0 <= request < len(self._requests):
            raise ValueError(f"request: expected the number of one of {len(self._requests)} that run, got {request!r}")
        found = self._requests[request]
        found.cancelled = True
        if found in self._waiting:
            self._waiting.remove(found)

    def _check_idle(self) -> None:
        if self._running:
            raise RuntimeError("this engine is generating: expected the iterator before to be exhausted or closed")

    def _run(self, requests: list[Request]) -> Generator[Event, None, None]:
        self._check_idle()
        self._running = True
        self._requests = requests
        self._waiting.extend(requests)
        try:
            while self._waiting or self._rows:
                chosen = self._prefill_waiting()
                if not self._ahead:
                    yield from self._events(chosen)
                self._decode()
                if self._ahead:
                    yield from self._events(chosen)
        finally:
            self._running = False
            self._reset()

    def _events(self, chosen: list[_Chosen]) -> Generator[Event, None, None]:
        for event in self._read_tokens(chosen):
            if not self._requests[event.request].cancelled:  # the consumer of an earlier event may have done that
                yield event

    @contextmanager
    def _on_stream(self) -> Generator[None, None, None]:
        """Queues the block's work on the stream that was current when the generation began."""
        with torch.inference_mode(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _decode(self) -> None:
        """Queues a step of the requests that are not at their limit, if there are any."""
        with self._on_stream():
            for row, request in enumerate(self._rows):
                if request and (request.cancelled or request.is_at_limit):
                    self._free(row)
            if not self._waiting:  # a waiting request would get the row after this step
                self._compact()
            if any(self._rows):
                logits = self._step(len(self._rows))
                choosers = [request.chooser if request else None for request in self._rows]
                choose(choosers, logits, self._step.ids)
                for request in filter(None, self._rows):
                    request.chosen += 1

    def _prefill_waiting(self) -> list[_Chosen]:
        """Prefills waiting requests into free rows, and queues the copy of each row's last token to the host."""
        with self._on_stream():
            for row, request in enumerate(self._rows):
                if request and request.cancelled:
                    self._free(row)
            for row in range(self.runner.rows):
                if not self._waiting:
                    break
                if row == len(self._rows):
                    self._rows.append(None)
                if self._rows[row] is None:
                    self._prefill(row, self._waiting.popleft())
            self._compact()
            count = len(self._rows)
            if self._ranks is not None and count:  # after one different token the ranks would diverge for good
                self._ranks.broadcast(self._step.ids[:count])
            self._on_host[:count].copy_(self._step.ids[:count], non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            return [(row, request, request.is_at_limit) for row, request in enumerate(self._rows) if request]

    def _prefill(self, row: int, request: Request) -> None:
        """Prefills a request's prompt and chooses its first token."""
        self.runner.clear(row)  # decode steps may have appended tokens to the unused row
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

    def _constrained(self, request: Request) -> Sampling:
        """The request's sampling with the model's constraints added."""
        sampling = request.sampling
        if self._constraints is None:
            return sampling
        found = self._constraints.of(
            len(request.prompt), request.limit, self.runner.device, sampling.repetition_penalty is not None
        )
        return replace(sampling, processors=(*found, *sampling.processors)) if found else sampling

    def _read_tokens(self, chosen: list[_Chosen]) -> list[Event]:
        """Waits for the copy of the tokens to the host, and for nothing else. Frees the rows whose text has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens = self._on_host.tolist()
        events = []
        with self._on_stream():
            for row, request, at_limit in chosen:
                is_end = tokens[row] in self.eos_ids
                events.append(Event(request.number, tokens[row], "stop" if is_end else "length" if at_limit else None))
                if is_end and request in self._rows:  # it may be in another row by now
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
        with self._on_stream():
            for row in range(self.runner.rows):
                self.runner.clear(row)


def make_engine(loaded: Loaded, rows: int, tokens: int, *, prefill_step: int | None = None) -> Engine:
    """An engine for sequences of at most `tokens` tokens, prompt and text together, as far as the model allows.

    The capacity of its rows is a multiple of 256, so that there are few different engines. The tokens that end a text
    are those of the model's generation_config, and the tokenizer's eos_token. What generation_config demands of every
    text (suppressed tokens, a least length, a repetition penalty) is applied; what is not supported is named in a
    warning. The model must not be changed (adapters, hooks, dtype, device) while the engine lives.

    Args:
        loaded: from `load`.
        rows: the number of sequences that run at a time, >= 1.
        tokens: of a sequence, >= 1.
        prefill_step: prompt tokens per forward pass, about; >= 1. Default: `runner.PREFILL_STEP`.

    Raises ValueError for an argument that is not as described, and for a model that makes no next tokens; see
    `make_runner`.
    """
    rows, tokens = check_int("rows", rows), check_int("tokens", tokens)
    eos_ids = end_tokens(loaded)
    constraints = Constraints(getattr(loaded.model, "generation_config", None), eos_ids)
    capacity = row_capacity(tokens, max_length(loaded))
    runner = make_runner(loaded, rows, capacity, prefill_step=prefill_step)
    return Engine(runner, eos_ids, ranks=loaded.ranks, constraints=constraints)


def row_capacity(tokens: int, longest: int) -> int:
    """The capacity of a row for so many tokens: the next multiple of 256, but at most `longest`."""
    return min(-(-tokens // 256) * 256, longest)
