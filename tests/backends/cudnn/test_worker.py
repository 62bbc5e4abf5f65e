"""The background worker: one task after another, at its time, and never in anybody's way."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import pytest

from fastattn.backends.cudnn.worker import Worker


def test_a_task_waits_for_its_time_and_holds_nobody_up() -> None:
    finished: list[tuple[str, float]] = []
    worker = Worker()
    start = time.monotonic()
    worker.submit(lambda: finished.append(("late", time.monotonic())), delay=0.2)
    worker.submit(lambda: finished.append(("soon", time.monotonic())))
    assert worker.wait(5)
    assert [name for name, _ in finished] == ["soon", "late"]
    assert finished[0][1] - start < 0.15
    assert 0.2 <= finished[1][1] - start < 2


def test_a_worker_finishes_what_it_holds_and_drops_the_rest() -> None:
    started, finished = threading.Event(), []

    def work(item: int) -> None:
        started.set()
        time.sleep(0.05)
        finished.append(item)

    worker = Worker()
    for i in range(5):
        worker.submit(partial(work, i))
    assert started.wait(5)
    assert not worker.wait(0.001)
    worker.stop()
    worker.submit(partial(work, 9))
    assert finished == [0]
    assert worker.wait(1)


def test_a_task_that_raises_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    worker, done = Worker(), threading.Event()
    worker.submit(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    worker.submit(done.set)
    assert done.wait(5)
    assert worker.wait(5)
    assert "a background task failed" in caplog.text


def test_a_forked_child_has_a_worker_of_its_own() -> None:
    worker = Worker()
    worker.submit(lambda: None)
    assert worker.wait(5)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        worker.submit(done.set)
        os._exit(0 if done.wait(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
