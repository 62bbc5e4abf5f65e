"""The one owner of everything that is cached per shape or per kind of call.

Routes with their bound kernels, launches, offsets, scratch memory, plans: each is a `Section` of `shape_cache`, or
another `Holder` that is registered with it. So `clear_plans()` drops all of it, `stats()["cache"]` counts all of it,
and what no longer holds is dropped by its reason (`ShapeCache.invalidate`), whichever section it is in.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from .common.forks import after_fork, renew_lock

K = TypeVar("K")
V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])


class Reason(Enum):
    """Why entries are dropped before their section is full."""

    CLEARED = "cleared"  #: the user called `clear_plans()`: everything is dropped
    BACKEND_REFUSED = "backend refused"  #: another backend serves some calls from now on: what routes them is dropped
    BINARY_READY = "binary ready"  #: a kernel was compiled: what passed over its backend until then is dropped


class Size(dict[str, int]):
    """What a holder has: `entries` and `bytes` of device memory; and its bounds, `max_entries` and `max_bytes` (0: it
    has none of its own)."""

    def __init__(self, entries: int = 0, size: int = 0, max_entries: int = 0, max_bytes: int = 0) -> None:
        super().__init__(entries=entries, bytes=size, max_entries=max_entries, max_bytes=max_bytes)


class Holder(Protocol):
    """Something with entries that may be dropped at any time, from any thread."""

    name: str  #: in `stats()`; holders may share one
    dropped_for: frozenset[Reason]  #: the reasons, besides `CLEARED`, for which `clear` is called

    def clear(self) -> None: ...

    def size(self) -> Size: ...


class ShapeCache:
    """All holders of cached entries. Thread-safe."""

    def __init__(self) -> None:
        self._holders: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()
        self._drops: Counter[Reason] = Counter()
        self._lock = threading.Lock()
        after_fork(self, renew_lock)

    def register(self, holder: Holder) -> None:
        """Takes in a holder, for as long as it lives."""
        self._holders[id(holder)] = holder

    def section(
        self,
        name: str,
        max_entries: int,
        *,
        weigh: Callable[[Any], int] | None = None,
        max_bytes: int = 0,
        dropped_for: Iterable[Reason] = (),
    ) -> Section[Any, Any]:
        """A new section with these bounds. See `Section`."""
        found: Section[Any, Any] = Section(name, max_entries, weigh, max_bytes, frozenset(dropped_for))
        self.register(found)
        return found

    def clear(self) -> None:
        """Drops every entry of every holder."""
        self.invalidate(Reason.CLEARED)

    def invalidate(self, reason: Reason) -> None:
        """Drops the entries of all holders that name this reason."""
        with self._lock:
            self._drops[reason] += 1
        for holder in self._all():
            if reason is Reason.CLEARED or reason in holder.dropped_for:
                holder.clear()

    def drops(self, reason: Reason) -> int:
        """How often entries were dropped for a reason. Who reads it before and after can tell whether what he made in
        between, and keeps, was made in time to be dropped."""
        with self._lock:
            return self._drops[reason]

    def stats(self) -> dict[str, Any]:
        """ "sections": for each name the sizes and bounds (`Size`) of its holders together; "entries" and "bytes": of
        all of them; "drops": for each `Reason` how often entries were dropped for it."""
        sections: dict[str, Size] = {}
        for holder in self._all():
            total = sections.setdefault(holder.name, Size())
            for what, number in holder.size().items():
                total[what] += number
        with self._lock:
            drops = {reason.value: self._drops[reason] for reason in Reason}
        sums = {what: sum(size[what] for size in sections.values()) for what in ("entries", "bytes")}
        return {**sums, "drops": drops, "sections": dict(sorted(sections.items()))}

    def _all(self) -> list[Holder]:
        """The holders that live. (`values()` would fail where another thread imports a module with a section.)"""
        return [holder for reference in self._holders.valuerefs() if (holder := reference()) is not None]


class Section(dict[K, V], Generic[K, V]):
    """A bounded dict of values that are made anew in microseconds. It drops everything when it is full: nothing is
    ordered, so that reading costs what a dict's reading costs.

    max_entries: the bound of entries. weigh: the device memory that a value holds, bytes. max_bytes: the bound of all.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(
        self,
        name: str,
        max_entries: int,
        weigh: Callable[[V], int] | None = None,
        max_bytes: int = 0,
        dropped_for: frozenset[Reason] = frozenset(),
    ) -> None:
        super().__init__()
        self.name = name
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.dropped_for = dropped_for
        #: Another number once its entries were dropped for a reason, and not for want of room: they hold no longer.
        self.generation = 0
        self._weigh = weigh
        self._bytes = 0

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.max_entries:
            self._drop()
        if self._weigh is not None:
            size = self._weigh(value)
            if self._bytes + size > self.max_bytes:
                self._drop()
            self._bytes += size
        super().__setitem__(key, value)

    def clear(self) -> None:
        self.generation += 1
        self._drop()

    def _drop(self) -> None:
        super().clear()
        self._bytes = 0

    def size(self) -> Size:
        return Size(len(self), self._bytes, self.max_entries, self.max_bytes)


class _Function:
    """The entries of a function under `lru_cache`."""

    dropped_for: frozenset[Reason] = frozenset()

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self._function = function

    def clear(self) -> None:
        self._function.cache_clear()

    def size(self) -> Size:
        info = self._function.cache_info()
        return Size(info.currsize, 0, info.maxsize or 0)


shape_cache = ShapeCache()  #: the process's
_functions: list[_Function] = []  # the cache itself holds weak references


def cached(max_entries: int, name: str) -> Callable[[F], F]:
    """`functools.lru_cache` for a function of shapes, as a holder of `shape_cache`."""

    def decorate(function: F) -> F:
        found: Any = lru_cache(maxsize=max_entries)(function)
        _functions.append(_Function(name, found))
        shape_cache.register(_functions[-1])
        return found  # type: ignore[no-any-return]

    return decorate
