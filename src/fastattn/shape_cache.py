"""Bounded memories for what is made anew in microseconds, and the list of all of them.

Whatever is remembered per shape, or per kind of call, is remembered in one of these: then `clear_plans()` forgets it
and `stats()` counts it without either knowing what it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

K = TypeVar("K")
V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])


class Kept(Protocol):
    """A memory of things that can be forgotten at any time, from any thread."""

    name: str  #: for `stats()`; several may share one

    def forget(self) -> None: ...

    def holds(self) -> tuple[int, int]:
        """Entries, and the bytes of device memory in them."""
        ...


_all: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()


def register(memory: Kept) -> None:
    """Has a memory forgotten and counted with all others, for as long as it lives."""
    _all[id(memory)] = memory


def forget_all() -> None:
    for memory in list(_all.values()):
        memory.forget()


def holdings() -> dict[str, dict[str, int]]:
    """By name: entries, and the bytes of device memory in them."""
    found: dict[str, dict[str, int]] = {}
    for memory in list(_all.values()):
        entries, size = memory.holds()
        sums = found.setdefault(memory.name, {"entries": 0, "bytes": 0})
        sums["entries"] += entries
        sums["bytes"] += size
    return dict(sorted(found.items()))


class Memo(dict[K, V], Generic[K, V]):
    """A dict that forgets everything when it is full. Reading costs what a dict's reading costs: nothing is ordered.

    limit: of entries. name: see `Kept`. weigh, most_bytes: the device memory that a value holds, and how much all may.
    """

    def __init__(
        self, limit: int, name: str = "other", weigh: Callable[[V], int] | None = None, most_bytes: int = 0
    ) -> None:
        super().__init__()
        self.limit = limit
        self.name = name
        self._weigh = weigh
        self._most_bytes = most_bytes
        self._bytes = 0
        register(self)

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.limit:
            self.clear()
        if self._weigh is not None:
            size = self._weigh(value)
            if self._bytes + size > self._most_bytes:
                self.clear()
            self._bytes += size
        super().__setitem__(key, value)

    def clear(self) -> None:
        super().clear()
        self._bytes = 0

    def forget(self) -> None:
        self.clear()

    def holds(self) -> tuple[int, int]:
        return len(self), self._bytes


class _Function:
    """The memory of a function."""

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self._function = function
        self.forget = function.cache_clear

    def holds(self) -> tuple[int, int]:
        return self._function.cache_info().currsize, 0


_functions: list[_Function] = []  # kept alive


def remembered(limit: int, name: str) -> Callable[[F], F]:
    """`functools.lru_cache` for what depends on shapes."""

    def decorate(function: F) -> F:
        found: Any = lru_cache(maxsize=limit)(function)
        _functions.append(_Function(name, found))
        register(_functions[-1])
        return found  # type: ignore[no-any-return]

    return decorate
