"""Progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], name: Callable[[T], str], shown: bool = True) -> Iterator[T]:
    """Yields the items and shows the progress: tqdm's bar on a terminal, else a line for each."""
    bar = None
    if shown and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(total=len(items), file=sys.stderr, leave=False)
    try:
        for number, item in enumerate(items, start=1):
            if bar is not None:
                bar.set_description(name(item))
            elif shown:
                print(f"[{number}/{len(items)}] {name(item)}", file=sys.stderr, flush=True)
            yield item
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()
