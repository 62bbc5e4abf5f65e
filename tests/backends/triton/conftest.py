"""Where Triton kernels run in tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn._compat import torch as torch_internals
from fastattn.shape_cache import shape_cache

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported


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
    else:
        monkeypatch.setenv("FASTATTN_COMPILE", "wait")
    return request.param


def filled(device: torch.device) -> Any:
    """See `torch_internals.allocator`."""
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is not written is NaN: torch fills outputs and scratch with it under this setting. What is allocated past
    torch's dispatcher is not filled: on the CPU nothing is, of kernels that are bound in such a test."""
    if not torch.cuda.is_available():
        shape_cache.clear()
        monkeypatch.setattr(torch_internals, "allocator", filled)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if not torch.cuda.is_available():
        shape_cache.clear()
