"""Functions of other libraries, compared and copied through their decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

from fastattn._compat.functions import copied, innermost, same, uses

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


def add(documented: str = "") -> Any:
    def function(x: int, cache: int = 0) -> int:
        return x + cache + helper

    function.__doc__ = documented
    return function


def subtract() -> Any:
    def function(x: int, cache: int = 0) -> int:
        return x - cache - helper

    return function


def closing(over: Any) -> Any:
    def function(x: int) -> Any:
        return x, over

    return function


@pytest.mark.parametrize(
    "one, other, expected",
    [
        (add(), add("other words"), True),
        (add(), subtract(), False),
        (renaming("past", "cache")(add()), renaming("past", "cache")(add()), True),
        (renaming("past", "cache")(add()), renaming("past", "cache")(subtract()), False),
        (renaming("past", "cache")(add()), renaming("past", "x")(add()), False),
        (renaming("past", "cache")(add()), add(), False),
        (renaming("past", "cache")(add()), doubling(add()), False),
        (doubling(renaming("past", "cache")(add())), doubling(renaming("past", "cache")(subtract())), False),
        (closing(1), closing(1), True),
        (closing(1), closing(True), False),
        (closing({"a"}), closing({"a"}), True),
        (closing(object()), closing(object()), False),
        (closing(add()), closing(subtract()), False),
        (add(), print, False),
        (None, None, False),
    ],
)
def test_same(one: Any, other: Any, expected: bool) -> None:
    assert same(one, other) is expected


def test_same_ends() -> None:
    def recursive() -> Any:
        def function() -> Any:
            return function

        return function

    assert not same(recursive(), recursive())


def test_copied_with_other_globals() -> None:
    function = doubling(renaming("past", "cache")(add()))
    copy = copied(function, {"helper": 100})
    assert copy(1, past=10) == 222
    assert function(1, past=10) == 24, "the original is as it was"
    assert innermost(copy) is not innermost(function)
    assert copy.__name__ == function.__name__


def test_copied_with_another_name() -> None:
    def forward(self: Any, past: int = 0, **more: int) -> Any:
        """past, in words"""
        return self.body(past=past, **more).past

    def body(cache: int) -> Any:
        return type("Output", (), {"cache": cache})

    self = type("Model", (), {"body": staticmethod(body)})
    function = renaming("old", "cache")(forward)
    assert uses(function, "past") and not uses(function, "cache")
    copy = copied(function, names={"past": "cache"})
    assert copy(self, cache=3) == copy(self, old=3) == copy(self, 3) == 3
    assert uses(function, "past") and not uses(copy, "past")


def test_what_cannot_be_copied() -> None:
    class Callable_:
        def __call__(self) -> None: ...

    function = functools.wraps(Callable_())(add())
    with pytest.raises(TypeError, match="wraps something that is no function"):
        copied(function)
    assert isinstance(function, FunctionType)
    function = functools.wraps(subtract())(add())
    with pytest.raises(TypeError, match="does not call what it wraps"):
        copied(function)
