"""Something done by several threads side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable


def side_by_side(count: int, run: Callable[[int], None]) -> None:
    """`run(0)`, `run(1)`, ..., each in a thread of its own, until all are done."""
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
