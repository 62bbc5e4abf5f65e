"""Copies of other libraries' functions, through their decorators, that use other globals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from fastattn._compat.functions import NotCopied, innermost, with_globals

helper = 1


def renaming(old: str, new: str) -> Callable[..., Any]:
    """As transformers' deprecate_kwarg."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def doubling(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return wrapped


def add() -> Any:
    def function(x: int, cache: int = 0) -> int:
        return x + cache + helper

    return function


def test_copied_with_other_globals() -> None:
    function = doubling(renaming("past", "cache")(add()))
    copy = with_globals(function, {"helper": 100})
    assert copy(1, past=10) == 222
    assert function(1, past=10) == 24, "the original is as it was"
    assert innermost(copy) is not innermost(function)
    assert copy.__name__ == function.__name__


def test_what_cannot_be_copied() -> None:
    class Callable_:
        def __call__(self) -> None: ...

    function = functools.wraps(Callable_())(add())
    with pytest.raises(NotCopied, match="something that is no function cannot be copied"):
        with_globals(function, {})
    assert isinstance(function, FunctionType)
    function = functools.wraps(add())(add())
    with pytest.raises(NotCopied, match="does not call what it wraps"):
        with_globals(function, {})
