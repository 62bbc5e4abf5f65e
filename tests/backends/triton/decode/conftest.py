"""How the decode kernels are launched in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastattn


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """force(splits=3, block_n=16) launches the kernel like that, whatever the rules say."""
    pytest.importorskip("triton")
    from fastattn.backends.triton.decode import forward

    choose = forward.choose
    used: list[bool] = []

    def force(**fields: int) -> None:
        used.append(False)

        def chosen(*arguments: Any) -> Any:
            used[-1] = True
            return dataclasses.replace(choose(*arguments), **fields)

        monkeypatch.setattr(forward, "choose", chosen)
        fastattn.clear_plans()  # no kernel that was bound before

    yield force
    fastattn.clear_plans()
    assert all(used)  # a name that nobody looks up would have no effect
