"""The processes that compile: a few at a time, started when there is work, ended when there is none.

Each has a thread of this process, which waits for it without the interpreter's lock.
"""

from __future__ import annotations

import atexit
import heapq
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ....common.forks import after_fork
from .flag_set import Binary, FlagSet
from .process import PATIENCE, Child, command

IDLE = 30.0  #: seconds without work after which a process ends: it holds 200 MB
MOST_IN_BACKGROUND, MOST = 4, 16  #: processes, and at most half or all of the cores

_pools: weakref.WeakSet[Compilers] = weakref.WeakSet()

Compile = Callable[[FlagSet], Binary]  #: raises CompileError or NoCompiler
Task = Callable[[Compile], None]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Compilers:
    """Does tasks that compile, each with a process of its own thread's; those that somebody waits for come first.

    At exit the processes are killed and the queue is dropped; a forked child starts afresh.
    """

    def __init__(self, start: Callable[[], Sequence[str]] = command, idle: float = IDLE, most: int = 0) -> None:
        """start: see `command`. most: processes in the background, 0: by the cores."""
        self._make = lambda: Child(start)
        self._idle = idle
        self._most = most or max(1, min(MOST_IN_BACKGROUND, cores() // 2))
        self._children: set[Child] = set()
        _pools.add(self)
        after_fork(self, Compilers._forked)
        self._reset()

    def _reset(self) -> None:
        self._tasks: list[tuple[bool, int, Task]] = []  # a heap: whether it can wait, its number, the task
        self._count = 0
        self._state = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._working = 0
        self._width = self._most
        self._stopped = False

    def _forked(self) -> None:
        for child in self._children:
            child.forget()
        self._children = set()
        self._reset()

    def submit(self, task: Task, waiting: bool = False) -> bool:
        """Has a task done. waiting: somebody waits for it. False where there is nobody to do it."""
        with self._state:
            if self._stopped:
                return False
            self._count += 1
            heapq.heappush(self._tasks, (not waiting, self._count, task))
            if not self._start_thread():
                self._tasks = [found for found in self._tasks if found[2] is not task]
                heapq.heapify(self._tasks)
                return False
            self._state.notify()
            return True

    def _start_thread(self) -> bool:
        """One more, where there is work for it. False where there is none at all."""
        free = len(self._threads) - self._working
        if len(self._tasks) > free and len(self._threads) < self._width:
            thread = threading.Thread(target=self._run, name="fastattn-compiler", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                logging.getLogger("fastattn").debug("no thread for a compiler: %s", error)
            else:
                self._threads.add(thread)
        return bool(self._threads)

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Within the block there may be as many processes as cores: somebody waits for much."""
        with self._state:
            self._width = max(self._most, min(MOST, cores()))
        try:
            yield
        finally:
            with self._state:
                self._width = self._most
                self._state.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is queued or in hand. False if that takes longer than `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._tasks and not self._working, timeout)

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the processes and drops the queue; nothing is taken on afterwards."""
        with self._state:
            self._stopped = True
            self._tasks.clear()
            self._state.notify_all()
            threads, children = list(self._threads), list(self._children)
        for child in children:
            child.stop()
        end = time.monotonic() + PATIENCE
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, end - time.monotonic()))
        for child in children:
            child.kill()
        for thread in others:
            thread.join(timeout)

    def _run(self) -> None:
        child, me = self._make(), threading.current_thread()
        with self._state:
            self._children.add(child)
        try:
            while (task := self._next(me)) is not None:
                try:
                    task(child.compile)
                except Exception:  # the next task is not to blame
                    logging.getLogger("fastattn").exception("a task of the compiler's failed")
                finally:
                    with self._state:
                        self._working -= 1
                        self._state.notify_all()
        finally:
            child.end()
            with self._state:
                self._threads.discard(me)
                self._children.discard(child)

    def _next(self, me: threading.Thread) -> Task | None:
        """None: the thread is to end. It is no longer counted then, under the same lock: a task that comes at once
        starts another."""
        with self._state:
            end = time.monotonic() + self._idle
            while not self._stopped:
                if self._tasks and len(self._threads) <= max(self._width, 1):
                    self._working += 1
                    return heapq.heappop(self._tasks)[2]
                left = end - time.monotonic()
                if left <= 0 or len(self._threads) > self._width:
                    break
                self._state.wait(left)
            self._threads.discard(me)
            return None


@atexit.register
def _stop_all() -> None:
    for pool in list(_pools):
        pool.stop()
