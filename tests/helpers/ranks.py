"""Processes that stand for the ranks of a job, on gloo: started once, given one function after another."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 180.0  #: that a function may take before it counts as hung; the first one imports torch and transformers


def _live(
    rank: int, world: int, store: str, seconds: float, connection: Connection, environment: dict[str, str]
) -> None:
    """A process's life: functions in, results (or a traceback) out."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = io.BytesIO()
            torch.save(function(*arguments), result)
            connection.send(result.getvalue())
        except Exception:
            connection.send(traceback.format_exc())


class Ranks:
    """So many processes. Replaced after one of them failed."""

    def __init__(self, world: int, folder: Path, seconds: float = SECONDS, **environment: str) -> None:
        """seconds: the process group's timeout. environment: variables of the processes."""
        self.world, self.folder, self.seconds, self.environment = world, folder, seconds, environment
        self.members: list[tuple[Any, Connection]] = []
        self.started = 0

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.started += 1
        store = str(self.folder / f"store{self.started}")
        for rank in range(self.world):
            here, there = context.Pipe()
            arguments = (rank, self.world, store, self.seconds, there, self.environment)
            process = context.Process(target=_live, args=arguments, daemon=True)
            process.start()
            there.close()  # so that its end shows here
            self.members.append((process, here))

    def stop(self) -> None:
        for process, connection in self.members:
            process.kill()
            process.join()
            connection.close()
        self.members = []

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank's call of a module's function returned; text where it raised or died."""
        if not self.members:
            self.start()
        deadline = time.monotonic() + SECONDS
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.members)}
        for connection in waiting:
            connection.send((function, arguments))
        found: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                found |= dict.fromkeys(waiting.values(), f"gave no answer within {SECONDS:.0f} s")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = "it died"
                found[rank] = answer if isinstance(answer, str) else torch.load(io.BytesIO(answer), weights_only=False)
        return [found[rank] for rank in range(self.world)]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same, failing the test when a rank raises, dies, or does not answer in time."""
        found = self.answers(function, *arguments)
        trouble = [f"rank {rank}: {answer}" for rank, answer in enumerate(found) if isinstance(answer, str)]
        if trouble:
            self.stop()
            pytest.fail("\n".join(trouble), pytrace=False)
        return found
