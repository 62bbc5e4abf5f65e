"""cuDNN handles: one for each thread and device, bound to the current stream, handed on. (No GPU: fakes.)"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from streams import Streams
from streams import streams as streams

from fastattn.backends.cudnn import runtime


class Library:
    """cuDNN's handles: which were made, which stream each is bound to."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.bound: list[tuple[int, int]] = []

    def create_handle(self) -> int:
        self.made.append(len(self.made))
        return self.made[-1]

    def set_stream(self, handle: int, stream: int) -> None:
        self.bound.append((handle, stream))


@pytest.fixture
def library(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(runtime, "frontend", lambda: runtime.Frontend(found, 91900, ""))
    monkeypatch.setattr(runtime, "_handles", defaultdict(list))
    monkeypatch.setattr(runtime, "_local", type(runtime._local)())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return found


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    gc.collect()
    return found[0]


def handle() -> int:
    return runtime.context(0).handle


def test_a_thread_keeps_its_context(library: Library) -> None:
    first = runtime.context(0)
    assert runtime.context(0) is first
    assert library.made == [0] and library.bound == [(0, 7)]


def test_a_handle_follows_the_stream(library: Library, streams: Streams) -> None:
    for stream in (7, 8, 8, 7, 0, 0):
        streams.current = stream
        runtime.context(0)
    assert library.bound == [(0, 7), (0, 8), (0, 7), (0, 0)]


def test_each_thread_and_device_has_its_own(library: Library) -> None:
    mine, other = runtime.context(0), runtime.context(1)
    assert mine.handle != other.handle and mine.address != other.address
    barrier = threading.Barrier(4)
    found: list[tuple[int, int]] = []

    def use() -> None:
        context = runtime.context(0)
        found.append((context.handle, context.address))
        barrier.wait(10)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({h for h, _ in found} | {mine.handle}) == 5 and len({a for _, a in found} | {mine.address}) == 5
    assert runtime.context(0) is mine


def test_a_handle_is_handed_on_when_its_thread_ends(library: Library, streams: Streams) -> None:
    """Threads come and go (a data loader's, a server's): handles are not to pile up, and their streams are not kept."""
    mine = handle()
    for stream in range(20, 30):
        streams.current = stream
        assert in_thread(handle) == 1
        assert library.bound[-1] == (1, stream)
    streams.current = 29
    in_thread(handle)
    assert library.bound[-2:] == [(1, 29), (1, 29)], "the new owner binds it, whatever it was bound to"
    assert library.made == [0, 1] and handle() == mine


def test_a_handle_is_handed_on_within_its_device(library: Library) -> None:
    first = in_thread(lambda: runtime.context(0).handle)
    second = in_thread(lambda: runtime.context(1).handle)
    assert first != second
    assert in_thread(lambda: runtime.context(1).handle) == second
    assert in_thread(lambda: runtime.context(0).handle) == first


def test_no_handle_no_context(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be made is not handed on."""

    def refuse() -> int:
        raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(library, "create_handle", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
            runtime.context(0)
    gc.collect()
    assert not runtime._handles[0] and not runtime._local.__dict__


def test_a_context_that_ends_after_its_module(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    context = runtime.Context(0)
    monkeypatch.setattr(runtime, "_handles", None)
    context.__del__()
