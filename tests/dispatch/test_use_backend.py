"""How a user says which backends may serve: use_backend, the backend argument, and the environment."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from served import Served

import fastattn
from fastattn.dispatch import registry

NAMES = ("decode", "hopper", "cudnn", "torch", "prefill", "reference")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """No settings of the machine's, nothing cached by other tests."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)


def test_use_backend_nests_and_ends() -> None:
    assert registry.allowed() == NAMES
    with fastattn.use_backend("torch", "reference"):
        assert registry.allowed() == ("torch", "reference")
        with fastattn.use_backend("reference"):
            assert registry.allowed() == ("reference",)
        assert registry.allowed() == ("torch", "reference")
    assert registry.allowed() == NAMES


def test_use_backend_ends_with_an_exception() -> None:
    block = fastattn.use_backend("reference")
    block.__enter__()
    assert not block.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert registry.allowed() == NAMES


def test_use_backend_serves_the_calls_of_its_block() -> None:
    served = Served()
    with fastattn.use_backend("reference"):
        fastattn.scaled_dot_product_attention(*qkv())
    fastattn.scaled_dot_product_attention(*qkv())
    assert served() == {"reference": 1, "torch": 1}


def test_the_backend_argument_wins_over_use_backend() -> None:
    served = Served()
    with fastattn.use_backend("torch"):
        fastattn.scaled_dot_product_attention(*qkv(), backend="reference")
    assert served() == {"reference": 1}


def test_use_backend_is_of_its_thread() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[tuple[str, ...]] = []

    def other() -> None:
        inside.wait(10)
        seen.append(registry.allowed())
        with fastattn.use_backend("torch"):
            seen.append(registry.allowed())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastattn.use_backend("reference"):
        inside.set()
        assert done.wait(10)
        assert registry.allowed() == ("reference",)
    thread.join()
    assert seen == [NAMES, ("torch",)]


def test_use_backend_is_of_its_task() -> None:
    async def task(name: str, here: asyncio.Event, there: asyncio.Event) -> tuple[str, ...]:
        with fastattn.use_backend(name):
            here.set()
            await there.wait()
            return registry.allowed()

    async def both() -> list[tuple[str, ...]]:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("torch", a, b), task("reference", b, a))

    assert asyncio.run(both()) == [("torch",), ("reference",)]


@pytest.mark.parametrize("names", [("flash",), ("torch", "sdpa"), (), ("",), (5,), (["torch"],)], ids=str)
def test_use_backend_with_unknown_names(names: tuple[Any, ...]) -> None:
    with pytest.raises(
        (ValueError, TypeError),
        match=r"^use_backend: expected one or more of decode, hopper, cudnn, torch, prefill, ref",
    ):
        with fastattn.use_backend(*names):
            pass


@pytest.mark.parametrize(
    "listed, cudnn, expected",
    [
        ("reference", None, ("reference",)),
        (" torch , decode ", None, ("torch", "decode")),
        ("", None, NAMES),
        (None, "0", ("decode", "hopper", "torch", "prefill", "reference")),
        (None, "OFF", ("decode", "hopper", "torch", "prefill", "reference")),
        (None, "1", NAMES),
        (None, "", NAMES),
        ("cudnn,torch", "0", ("torch",)),
        ("cudnn,torch", "1", ("cudnn", "torch")),
    ],
)
def test_environment(
    listed: str | None, cudnn: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FASTATTN_BACKENDS", listed), ("FASTATTN_CUDNN", cudnn)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert registry.allowed() == expected
    with fastattn.use_backend("cudnn"):  # what the program says counts more
        assert registry.allowed() == ("cudnn",)


def test_environment_with_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKENDS", "torch,flash")
    with pytest.raises(ValueError, match=r"^FASTATTN_BACKENDS: expected .*, got flash"):
        fastattn.scaled_dot_product_attention(*qkv())


def test_environment_that_allows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKENDS", "cudnn")
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    q, k, v = qkv()
    for needs_gradient in (False, True):
        with pytest.raises(ValueError, match=r"FASTATTN_CUDNN|no allowed backend"):
            fastattn.scaled_dot_product_attention(q.requires_grad_(needs_gradient), k, v)
    explanation = fastattn.explain(*qkv())
    assert explanation.chosen is None
    assert str(explanation).count("not allowed here") == len(NAMES)
