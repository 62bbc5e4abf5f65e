"""A pretended GPU, with and without the native module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hopper_launches import HopperGpu, pretend
from native_driver import NativeDriver, take

import fastattn
from fastattn.dispatch.native import calls


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[HopperGpu]:
    found = pretend(monkeypatch)
    yield found
    fastattn.clear_plans()  # what was offered, too
    if calls.module is not None:
        calls.module.clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, gpu: HopperGpu) -> NativeDriver:
    return take(monkeypatch, gpu)
