"""One background thread that takes items in turn. It starts with the first item and never keeps the process alive."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """Calls `work(item)` for each submitted item, one at a time, on a thread of its own. `work` must not raise.

    delay: seconds between an item's submission and its turn.

    At exit the queue is dropped and the item in hand is finished (a thread that is killed inside a driver call can
    take the process down); after a fork the child starts afresh, without the parent's queue.
    """

    def __init__(self, work: Callable[[Any], None], delay: float = 0.0) -> None:
        self._work = work
        self.delay = delay
        _workers.add(self)
        self.reset()

    def reset(self) -> None:
        self._items: deque[tuple[float, Any]] = deque()  # when its turn comes, and the item
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._stopped = False

    def submit(self, item: Any) -> None:
        with self._state:
            if self._stopped:
                return
            self._items.append((time.monotonic() + self.delay, item))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fastattn-plans", daemon=True)
                self._thread.start()
            self._state.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is queued or in hand. False if that takes longer than `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._items and not self._busy, timeout)

    def stop(self, timeout: float = 10.0) -> None:
        """Drops the queue and waits for the item in hand; nothing is taken on afterwards."""
        with self._state:
            self._stopped = True
            self._items.clear()
            self._state.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._items or self._stopped)
                if self._items:
                    self._state.wait_for(lambda: self._stopped, self._items[0][0] - time.monotonic())
                if self._stopped:
                    return
                item = self._items.popleft()[1]
                self._busy = True
            try:
                self._work(item)
            finally:
                with self._state:
                    self._busy = False
                    self._state.notify_all()


@atexit.register
def _stop_all() -> None:
    for worker in list(_workers):
        worker.stop()


def _reset_all() -> None:
    for worker in list(_workers):
        worker.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
