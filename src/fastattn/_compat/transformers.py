"""transformers: names that changed between 5.4 and the newest version tested, and names that it does not promise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

#: What a forward calls the cache of keys and values: since 5.24, and before it (deprecated then, gone in 5.40).
CACHE_ARGUMENTS = ("cache", "past_key_values")

#: Arguments by which an attention function sees that it runs under continuous batching: there no mask says which keys
#: belong to which query. `cache` until 5.22; the indices since.
PAGED_ARGUMENTS = ("cache", "read_index", "write_index", "block_table")


def cache_argument(model: Any) -> str | None:
    """What the forward of a model, or of its body, calls its cache of keys and values; None if it names none.

    The forward itself is asked, not the version: code that comes with a model may be older than transformers. One that
    takes any keyword may well ignore a cache, so it counts as taking none.
    """
    forward = getattr(model, "_orig_mod", model).forward  # of a compiled model: the one that was compiled
    return _cache_argument(getattr(forward, "__func__", forward))


@lru_cache(maxsize=64)
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    arguments = signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in arguments), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model's forward, or to `generate`. TypeError where it takes none."""
    name = cache_argument(model)
    if name is None:
        raise TypeError(f"{type(model).__name__}: its forward takes no cache of keys and values")
    return {name: cache}
