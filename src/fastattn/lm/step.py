"""A decode step of the first rows: captured in a CUDA graph for each bucket, or as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..common.notice import warn_once
from .load import _line
from .parallel import Ranks
from .runner import Runner

WARM_UPS = 3  #: steps before a capture: what is compiled, tuned or allocated by a first call cannot be captured
TIDY_EVERY = 64  #: replays after which rows that nobody uses, but that run along in their bucket, are emptied


def buckets(rows: int) -> list[int]:
    """The numbers of rows that steps are captured for: powers of two, and all rows."""
    return [*(1 << i for i in range((rows - 1).bit_length())), rows]


class DecodeStep:
    """Decodes one token for each of the first rows, from static ids that the greedy choices are written back to.

    `ids`, int64 `[rows]` on the device, hold each row's last token; the caller writes over what it chooses otherwise.
    """

    def __init__(self, runner: Runner, capture: bool | None = None, ranks: Ranks | None = None) -> None:
        """capture: default: on a GPU, unless the runner says that it is not `capturable`. ranks: see `Engine`."""
        if capture is None:
            capture = runner.device.type == "cuda" and runner.capturable
        self._runner = runner
        self._capture = capture
        self._ranks = ranks
        self._captured: dict[int, Any] = {}
        self._pool: Any = None
        self._replays = 0
        self.ids = torch.zeros(runner.rows, dtype=torch.int64, device=runner.device)

    def prepare(self, rows: int) -> None:
        """Captures the steps for up to so many rows, where that was not done yet.

        Warming up and capturing append tokens to rows, so it is done while all rows are empty; it leaves them empty.
        """
        if not self._capture:
            return
        needed = buckets(self._runner.rows)
        missing = [size for size in needed if size <= self._bucket(rows) and size not in self._captured]
        try:
            for size in reversed(missing):  # the largest first: what it leaves behind is room for the others
                self._captured[size] = self._record(size)
        except Exception as error:
            if self._ranks is not None and not isinstance(error, _NotCaptured):
                raise  # steps that only some ranks took: their collectives cannot be matched again
            self._capture = False
            # A capture that fails ends with a second error, which says less than the first.
            reason = _line(error.__context__ or error)
            warn_once(f"decode steps are not captured in a CUDA graph, which makes them slower: {reason}", "capture")
        finally:
            if missing:
                for row in range(self._runner.rows):
                    self._runner.clear(row)

    def __call__(self, rows: int) -> Tensor:
        """A step of the first `rows` rows. Returns logits `[N, V]`, N >= rows, good until the next step."""
        size = self._bucket(rows)
        captured = self._captured.get(size)
        if captured is None:
            return self._plain(rows)
        self._replays += 1
        if self._replays % TIDY_EVERY == 0:
            # They are harmless, but attention to what they have gathered takes time.
            for row in range(rows, size):
                self._runner.clear(row)
        return captured.replay()

    def _plain(self, rows: int) -> Tensor:
        ids = self.ids[:rows]
        logits = self._runner.decode(ids)
        ids.copy_(logits.argmax(-1))
        return logits

    def _bucket(self, rows: int) -> int:
        return next(size for size in buckets(self._runner.rows) if size >= rows)

    def _record(self, size: int) -> Captured:
        """A captured step. All ranks get one, or all of them `_NotCaptured`: they go the same way."""
        self._warm_up(size)
        if self._ranks is None:
            return self._recorded(size)
        found: Captured | None = None
        failure: str | None = None
        try:
            found = self._recorded(size)
        except Exception as error:
            failure = _line(error.__context__ or error)
        # Nothing runs while it is captured: no rank waits in a collective of it for one that could not.
        failure = self._ranks.trouble(failure)
        if found is None or failure is not None:
            raise _NotCaptured(failure)
        return found

    def _warm_up(self, size: int) -> None:
        device = self._runner.device
        side, current = _side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._plain(size)
        current.wait_stream(side)

    def _recorded(self, size: int) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, side = torch.cuda.CUDAGraph(), _side_stream(self._runner.device)
        # "thread_local": other threads may allocate meanwhile, such as those that build plans.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            logits = self._plain(size)
        return Captured(graph, logits)


class _NotCaptured(RuntimeError):
    """A step that could not be captured on every rank: all go on without."""


class Captured:
    """A step as a CUDA graph, and the logits `[N, V]` that each replay writes."""

    def __init__(self, graph: Any, logits: Tensor) -> None:
        self._graph = graph
        self._logits = logits

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._logits


@cache
def _side_stream(device: torch.device) -> Any:
    """One for all captures on a device: cuBLAS keeps a workspace for every stream that it has ever seen."""
    return torch.cuda.Stream(device)
