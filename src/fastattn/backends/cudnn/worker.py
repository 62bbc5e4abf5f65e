"""One background thread that does tasks in turn. It starts with the first one and never keeps the process alive."""

from __future__ import annotations

import atexit
import heapq
import logging
import threading
import time
import weakref
from collections.abc import Callable

from ...common.forks import after_fork

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """Does each submitted task, one at a time, on a thread of its own. What a task raises is logged.

    At exit the queue is dropped and the task in hand is finished (a thread that is killed inside a driver call can
    take the process down); after a fork the child starts afresh, without the parent's queue.
    """

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        """begin: called once by the thread, before its first task."""
        self._begin = begin
        _workers.add(self)
        after_fork(self, Worker.reset)
        self.reset()

    def reset(self) -> None:
        self._tasks: list[tuple[float, int, Callable[[], None]]] = []  # a heap: when it is due, its number, the task
        self._count = 0
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._stopped = False

    def submit(self, task: Callable[[], None], delay: float = 0.0) -> bool:
        """Has the task done, not before `delay` seconds have passed. False where there is nobody to do it."""
        with self._state:
            if self._stopped:
                return False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="fastattn-plans", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the system has no more threads: calls go on with the plans there are
                    logging.getLogger("fastattn").debug("a background task is left out: %s", error)
                    return False
            self._state.notify_all()
            self._count += 1
            # Last: an interrupt may come after it, and what is queued has to be heard of.
            heapq.heappush(self._tasks, (time.monotonic() + delay, self._count, task))
            return True

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is queued or in hand. False if that takes longer than `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._tasks and not self._busy, timeout)

    def stop(self, timeout: float = 10.0) -> None:
        """Drops the queue and waits for the task in hand; nothing is taken on afterwards."""
        with self._state:
            self._stopped = True
            self._tasks.clear()
            self._state.notify_all()
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        self._begin()
        while True:
            with self._state:
                while not self._stopped and not (self._tasks and self._tasks[0][0] <= time.monotonic()):
                    self._state.wait(self._tasks[0][0] - time.monotonic() if self._tasks else None)
                if self._stopped:
                    return
                task = heapq.heappop(self._tasks)[2]
                self._busy = True
            try:
                task()
            except Exception:  # the next task is not to blame
                logging.getLogger("fastattn").exception("a background task failed")
            finally:
                with self._state:
                    self._busy = False
                    self._state.notify_all()


@atexit.register
def _stop_all() -> None:
    for worker in list(_workers):
        worker.stop()
