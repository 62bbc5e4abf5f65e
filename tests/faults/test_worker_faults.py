"""The background builder: what fails there, threads that cannot start, forks, and a process that ends meanwhile."""

from __future__ import annotations

import contextlib
import heapq
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, check, make
from cases import run as run_case

import fastattn
from fastattn.backends.cudnn import plans, worker
from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.plan_policy import SERVED_AFTER
from fastattn.backends.cudnn.plans import Plans
from fastattn.backends.cudnn.worker import Worker
from fastattn.common import notice
from fastattn.dispatch import serve

OFTEN = SERVED_AFTER  #: a shape that is asked for so often has its plan built
CASE = Case(dtype=torch.float32, mask="causal", q_len=9, kv_len=9)


def key(length: int) -> PlanKey:
    return PlanKey("forward", 0, (Operand("q", (1, 1, length, 8), (8, 8, 8, 1), torch.float16),))


class Made(Plans):
    """Plans of a test's own. Those of 13 tokens fail in a way of the test's own."""

    def __init__(self) -> None:
        self.built: list[PlanKey] = []
        super().__init__(load=lambda key: None, build=self.build, occasion=0.0, delay=0.0)

    def build(self, key: PlanKey) -> Any:
        self.built.append(key)
        if key.operands[0].dims[2] == 13:
            raise failure[0]
        return SimpleNamespace(key=key, store=lambda: None)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, fresh_warnings: None) -> Made:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("FASTATTN_PLANS", raising=False)
    return Made()


failure: list[BaseException] = [RuntimeError("none")]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cuDNN error"), MemoryError(), torch.OutOfMemoryError("none"), KeyError("x"), AssertionError()],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_in_the_background_is_reported_once(error: Exception, cache: Made) -> None:
    failure[0] = error
    with pytest.warns(fastattn.FastattnWarning, match="could not be built in the background") as warned:
        for _ in range(2 * OFTEN):
            assert cache.best(key(13), key(0)).key == key(0)
            assert cache.wait(10)
    assert len(warned) == 1
    assert cache.built.count(key(13)) == 1
    assert cache.stats()["background_failures"] == 1
    for _ in range(OFTEN):
        cache.best(key(7), key(0))
    assert cache.wait(10) and cache.best(key(7), key(0)).key == key(7), "the next one is built"


def test_a_failure_where_warnings_are_errors(cache: Made, caplog: pytest.LogCaptureFixture) -> None:
    """-W error: the report itself raises, in the background, where it can stop nobody."""
    failure[0] = RuntimeError("cuDNN error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * OFTEN):
            cache.best(key(13), key(0))
            assert cache.wait(10)
    assert cache.built.count(key(13)) == 1 and "a background task failed" in caplog.text
    assert cache.best(None, key(0)).key == key(0)


def test_no_thread_can_be_started(cache: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is out of threads for a while. Calls go on, and the next attempt that can succeed does."""
    cache.get(key(0))
    with monkeypatch.context() as patch:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(OFTEN):
            assert cache.best(key(100), key(0)).key == key(0)
    for _ in range(OFTEN):
        cache.best(key(101), key(0))
    assert cache.wait(5)
    assert key(101) in cache.built


def test_an_interrupted_submit_leaves_nothing_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    found, done = Worker(), threading.Event()
    found.submit(lambda: None)
    assert found.wait(5)
    push = heapq.heappush

    def pushed_and_interrupted(*arguments: Any) -> None:
        push(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "heapq", SimpleNamespace(heappush=pushed_and_interrupted, heappop=heapq.heappop))
        with pytest.raises(KeyboardInterrupt):
            found.submit(done.set)
    assert found.wait(1) and done.is_set()


def in_a_child(work: Callable[[], None], timeout: float = 20.0) -> str:
    """How a forked child ends that does the work: "done", "failed", or "hangs"."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return "done" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's own pool of threads does not survive a fork: that is torch's business, and not looked at here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_use(seed: int, cache: Made) -> None:
    inputs = make(CASE, seed=seed)

    def calls() -> None:
        run_case(inputs)
        check(CASE.but(kv_lengths=(3, 9), q_len=4), None)
        for _ in range(OFTEN):
            cache.best(key(50), key(0))
        assert cache.wait(10) and cache.best(key(50), key(0)).key == key(50)
        fastattn.stats()

    with one_thread():
        run_case(inputs)
        cache.best(key(5), key(0))
        assert in_a_child(calls) == "done"
        calls()


LOCKS = {
    "calls are counted": lambda: serve._lock,
    "a warning is given": lambda: notice._lock,
    "a plan is looked up": lambda: plans.shared.cache._lock,
}


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_is_in_the_middle(name: str, seed: int) -> None:
    """As a data loader forks workers while a training thread calls."""
    inputs, held, go_on = make(CASE, seed=seed), threading.Event(), threading.Event()

    def hold() -> None:
        with LOCKS[name]():
            held.set()
            go_on.wait(30)

    def work() -> None:
        run_case(inputs)
        notice._given.add("told")
        notice.warn_once("told")
        fastattn.stats()

    with one_thread():
        work()
        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(5)
            assert in_a_child(work, timeout=2) == "done"
        finally:
            go_on.set()
            thread.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_a_plan_is_built() -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(key: PlanKey) -> Any:
        started.set()
        go_on.wait(30)
        return SimpleNamespace(key=key, store=lambda: None)

    cache = Plans(load=lambda key: None, build=slow)
    thread = threading.Thread(target=cache.get, args=(key(3),))
    thread.start()
    try:
        assert started.wait(5)

        def work() -> None:
            go_on.set()  # the child's own: nobody else of it waits
            cache.get(key(3))

        assert in_a_child(work, timeout=2) == "done"
    finally:
        go_on.set()
        thread.join()


#: A process that has a plan under way and one queued, as it comes to its end.
PROGRAM = """
import sys, threading, time, types
import torch
from fastattn.backends.cudnn import plan_policy, plans, worker
from fastattn.backends.cudnn.graphs import PlanKey
torch.cuda.is_current_stream_capturing = lambda: False
began = threading.Event()
def build(key):
    if key.left > 0:
        began.set()
        time.sleep({seconds})
        print("built", key.left, flush=True)
    return types.SimpleNamespace(key=key, store=lambda: None)
held = plans.Plans(load=lambda key: None, build=build, occasion=0.0, delay=0.0)
for left in (1, 2):
    for _ in range(plan_policy.SERVED_AFTER):
        held.best(PlanKey("forward", 0, (), left), PlanKey("forward", 0, ()))
began.wait()
{end}
"""


@pytest.mark.parametrize(
    "end, status, error",
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('the program is wrong')", 1, "the program is wrong"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
        ("import os; os._exit(4)", 4, ""),
    ],
)
def test_a_process_that_ends_while_a_plan_is_built(end: str, status: int, error: str, tmp_path: Path) -> None:
    """The one under way is finished, the one queued is dropped, and the process ends as it would have."""
    done = end_with(end, 0.3, tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout.split() == ([] if "_exit" in end else ["built", "1"])
    assert error in done.stderr and len(done.stderr.splitlines()) <= (0 if not error else 8), done.stderr


def test_a_process_that_ends_while_a_build_hangs(tmp_path: Path) -> None:
    """It is not waited for for ever."""
    done = end_with("worker.Worker.stop.__defaults__ = (0.2,)", 60, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def end_with(end: str, seconds: float, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).format(end=end, seconds=seconds))
    return subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=50, check=False)
