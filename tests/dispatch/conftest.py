"""The two ways of a call that came back."""

from __future__ import annotations

from collections.abc import Iterator

import native_emulation
import pytest


@pytest.fixture(params=["python", "native"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For tests that have to hold whether Python serves such a call or `dispatch/native` does, whose kernels compute
    what the reference and torch do: see `native_emulation.py`."""
    emulation = native_emulation.take(monkeypatch) if request.param == "native" else None
    yield request.param
    assert emulation is None or not emulation.errors
