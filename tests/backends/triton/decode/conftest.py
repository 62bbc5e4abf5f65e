"""Where the decode kernels run, and how they are launched in tests."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

import fastattn


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels run natively")
        triton = pytest.importorskip("triton")
        from triton.runtime.interpreter import InterpretedFunction

        assert isinstance(triton.language.max, InterpretedFunction), (
            "triton was imported before TRITON_INTERPRET was set"
        )
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    return request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What is not written is NaN: torch fills outputs and scratch with it under this setting."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """force(splits=3, block_n=16) launches the kernel like that, whatever the rules say."""
    pytest.importorskip("triton")
    from fastattn.backends.triton.decode import forward

    choose = forward.choose

    def force(**fields: int) -> None:
        def chosen(*arguments: Any) -> Any:
            return dataclasses.replace(choose(*arguments), **fields)

        monkeypatch.setattr(forward, "choose", chosen)
        fastattn.clear_plans()  # no kernel that was bound before

    yield force
    fastattn.clear_plans()
