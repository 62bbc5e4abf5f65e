"""Gluon by one set of names. It is experimental and renames things from release to release of Triton (3.6 to 3.9)."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import base_value


def _first(*places: tuple[Any, str]) -> Any:
    for module, name in places:
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"this Triton's Gluon has none of {', '.join(name for _, name in places)}")


def _aggregate() -> Any:
    if hasattr(gluon, "aggregate"):
        return gluon.aggregate
    from triton.language import core

    return core._aggregate


aggregate = _aggregate()
load_tile = _first((tma, "async_load"), (tma, "async_copy_global_to_shared"))
store_tile = _first((tma, "async_store"), (tma, "async_copy_shared_to_global"))
barrier = _first((gl, "barrier"), (gl, "thread_barrier"))  #: of the warps of one partition


@gluon.constexpr_function
def as_value(x: Any) -> Any:
    """A field of an aggregate: what the compiler knows (None, numbers) becomes a constant."""
    return x if isinstance(x, base_value) else gl.constexpr(x)
