"""`DecodeStep`: a decode step of the first rows, captured in a CUDA graph for each bucket of rows, or run directly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ...backends.triton.binaries.policy import waiting
from ...common.failures import first_line
from ...common.notice import warn_once
from ..parallel import Ranks
from ..runner import Runner

WARM_UPS = 3  #: steps before a capture: compilation, tuning and allocation by a first call cannot be captured
CLEAR_EVERY = 64  #: replays after which unused rows of the bucket are emptied


def buckets(rows: int) -> list[int]:
    """The numbers of rows that steps are captured for: powers of two, and all rows."""
    return [*(1 << i for i in range((rows - 1).bit_length())), rows]


class CapturedStep(Protocol):
    """A step that can be run again."""

    def replay(self) -> Tensor:
        """Runs the step. Returns its logits `[N, V]`, good until the next step."""
        ...


class Recorder(Protocol):
    """Captures steps. `GraphRecorder` is the one for GPUs."""

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """Runs a step until nothing is compiled, tuned or allocated by it."""
        ...

    def record(self, step: Callable[[], Tensor]) -> CapturedStep: ...


class DecodeStep:
    """Decodes one token for each of the first rows, and writes the greedy choices back to the ids it read.

    `ids`, int64 `[rows]` on the device, holds the last token of each row. The caller overwrites the tokens that it
    chooses otherwise.
    """

    def __init__(
        self,
        runner: Runner,
        capture: bool | None = None,
        ranks: Ranks | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            runner: runs the steps.
            capture: whether steps are captured. Default: on a GPU, if the runner is `capturable`.
            ranks: see `Engine`.
            recorder: captures the steps. Default: in CUDA graphs.
        """
        if capture is None:
            capture = runner.device.type == "cuda" and runner.capturable
        self._runner = runner
        self._capture = capture
        self._ranks = ranks
        self._recorder = recorder or GraphRecorder(runner.device)
        self._captured: dict[int, CapturedStep] = {}
        self._replays = 0
        self.ids = torch.zeros(runner.rows, dtype=torch.int64, device=runner.device)

    @property
    def captured_buckets(self) -> list[int]:
        """The numbers of rows whose steps are captured."""
        return sorted(self._captured)

    def prepare(self, rows: int) -> None:
        """Captures the steps of up to so many rows that were not captured yet.

        Warming up and capturing append tokens to rows. All rows must be empty before, and are empty afterwards.
        """
        if not self._capture:
            return
        needed = buckets(self._runner.rows)
        missing = [size for size in needed if size <= self._bucket(rows) and size not in self._captured]
        try:
            for size in reversed(missing):  # the largest first: the others fit into the memory that it leaves
                self._captured[size] = self._record(size)
        except Exception as error:
            if self._ranks is not None and not isinstance(error, _NotCaptured):
                raise  # only some ranks ran these steps: their collectives cannot be matched any more
            self._capture = False
            # A capture that fails ends with a second error, which tells less than the first.
            reason = first_line(error.__context__ or error)
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
            return self._run(rows)
        self._replays += 1
        if self._replays % CLEAR_EVERY == 0:
            # Unused rows are harmless, but attention to the tokens that they collect takes time.
            for row in range(rows, size):
                self._runner.clear(row)
        return captured.replay()

    def _run(self, rows: int) -> Tensor:
        ids = self.ids[:rows]
        logits = self._runner.decode(ids)
        ids.copy_(logits.argmax(-1))
        return logits

    def _bucket(self, rows: int) -> int:
        return next(size for size in buckets(self._runner.rows) if size >= rows)

    def _record(self, size: int) -> CapturedStep:
        """A captured step. Either all ranks get one, or `_NotCaptured` is raised on all of them."""

        def step() -> Tensor:
            return self._run(size)

        with waiting():  # for the kernels that are to be captured
            self._recorder.warm_up(step)
        if self._ranks is None:
            return self._recorder.record(step)
        found: CapturedStep | None = None
        failure: str | None = None
        try:
            found = self._recorder.record(step)
        except Exception as error:
            failure = first_line(error.__context__ or error)
        # Nothing runs during a capture, so no rank waits in a collective for one that failed.
        failure = self._ranks.first_failure(failure)
        if found is None or failure is not None:
            raise _NotCaptured(failure)
        return found


class _NotCaptured(RuntimeError):
    """A step could not be captured on every rank, so that all ranks run it directly."""


class GraphRecorder:
    """Captures steps in CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """See `Recorder`."""
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(side)

    def record(self, step: Callable[[], Tensor]) -> CapturedGraph:
        """See `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, side = torch.cuda.CUDAGraph(), _side_stream(self._device)
        # "thread_local": other threads may allocate during the capture, such as those that build plans.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            logits = step()
        return CapturedGraph(graph, logits)


class CapturedGraph:
    """A step as a CUDA graph, and the logits `[N, V]` that each replay writes."""

    def __init__(self, graph: Any, logits: Tensor) -> None:
        self._graph = graph
        self._logits = logits

    def replay(self) -> Tensor:
        """See `CapturedStep`."""
        self._graph.replay()
        return self._logits


@cache
def _side_stream(device: torch.device) -> Any:
    """One stream for all captures on a device, because cuBLAS keeps a workspace for every stream it has ever used."""
    return torch.cuda.Stream(device)
