"""Gluon by one set of names. It is experimental and renames things from release to release of Triton (3.6 to 3.9).

Imports triton.
"""

from __future__ import annotations

from typing import Any, dataclass_transform

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .versions import Gone, gone, need


def _first(*places: tuple[Any, str]) -> Any:
    for module, name in places:
        if hasattr(module, name):
            return getattr(module, name)
    raise Gone(gone("triton", f"Gluon's {' or '.join(name for _, name in places)}"))


def _aggregate() -> Any:
    if hasattr(gluon, "aggregate"):
        return gluon.aggregate
    return need("triton", "triton.language.core._aggregate")


base_value: Any = need("triton", "triton.language.core.base_value")  #: of what a kernel computes with
_aggregate_of = _aggregate()
load_tile = _first((tma, "async_load"), (tma, "async_copy_global_to_shared"))
store_tile = _first((tma, "async_store"), (tma, "async_copy_shared_to_global"))
barrier = _first((gl, "barrier"), (gl, "thread_barrier"))  #: of the warps of one partition


def reinterpret(x: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Shared memory as another shape and layout."""
    method = x.reinterpret if hasattr(x, "reinterpret") else x._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


reinterpret.__triton_builtin__ = True  # type: ignore[attr-defined]


@dataclass_transform()
def aggregate(cls: Any) -> Any:
    """A class whose annotations name the fields of one value of a kernel, in the order in which it is made of them."""
    names = tuple(cls.__annotations__)

    def __init__(self: Any, *values: Any) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))

    __init__.__triton_builtin__ = True  # type: ignore[attr-defined]  # Python: not to be compiled
    cls.__init__ = __init__
    return _aggregate_of(cls)


#: What `triton_compiler.compiled` takes as `source_of`.
SOURCE_OF = "triton.experimental.gluon._runtime.GluonASTSource"
