"""Triton's interpreter without work that it does again and again, to the same end.

Most of an interpreted kernel's time goes to neither NumPy nor its own lines. With each call of a device function
the interpreter replaces the functions of `triton.language`, as its launch has done already; each tensor makes anew the
objects that describe its shape, each type too. Here that is done once for a launch, or for a shape.

What is computed is the same. Where Triton is not as this file knows it, its interpreter stays as it is.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TENSOR = {"handle", "shape", "numel", "type", "dtype"}
_BLOCK = {"element_ty", "shape", "numel", "name"}
_SHAPES = 4096  #: that are remembered; a session of tests has a few hundred


def install() -> bool:
    """Whether Triton's interpreter is in use, and quick from now on. Nothing happens before Triton is imported."""
    interpreter, core = (sys.modules.get(f"triton.{name}") for name in ("runtime.interpreter", "language.core"))
    if interpreter is None or core is None or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if not hasattr(interpreter, "__quick__"):
        interpreter.__quick__ = []
        try:
            replaced = _once_a_launch(interpreter, core) + _dtypes(interpreter, core) + _shapes(core)
        except AttributeError:
            return False
        interpreter.__quick__ = [(owner, name, getattr(owner, name), quick) for owner, name, quick in replaced]
        _set(interpreter.__quick__, quick=True)
    return bool(interpreter.__quick__)


@contextmanager
def as_triton_has_it() -> Iterator[None]:
    """The interpreter within the block is Triton's own."""
    replaced = sys.modules["triton.runtime.interpreter"].__quick__
    _set(replaced, quick=False)
    try:
        yield
    finally:
        _set(replaced, quick=True)


def _set(replaced: list[tuple[Any, str, Any, Any]], quick: bool) -> None:
    for owner, name, own, other in replaced:
        setattr(owner, name, other if quick else own)


def _once_a_launch(interpreter: Any, core: Any) -> list[tuple[Any, str, Any]]:
    """A device function's call replaces nothing that its launch, or another call within it, has replaced."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    language = sys.modules["triton.language"]
    running = threading.local()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, running.replaced = getattr(running, "replaced", None), set()
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.replaced = outer

    def patched(function: Any) -> Any:
        replaced = getattr(running, "replaced", None)
        if replaced is None:  # a device function outside of a launch
            return patch(function)
        named = {x.__name__ for x in function.__globals__.values() if x is language or x is core}
        if named and named <= replaced:
            return None  # a device function's call drops it; the launch itself comes first
        replaced |= named
        return patch(function)

    return [(interpreter.GridExecutor, "__call__", launched), (interpreter, "_patch_lang", patched)]


def _dtypes(interpreter: Any, core: Any) -> list[tuple[Any, str, Any]]:
    """NumPy's dtypes: Triton makes the table of all of them to look up one, with every operation."""
    ask, equal = interpreter._get_np_dtype, core.dtype.__eq__
    known: dict[str, Any] = {}

    def numpy_dtype(of: Any) -> Any:
        element = of.element_ty if type(of) is core.block_type else of
        if type(element) is not core.dtype:  # of a pointer
            return ask(of)
        if element.name not in known:
            known[element.name] = ask(element)
        return known[element.name]

    def same(self: Any, other: Any) -> Any:
        return self is other or equal(self, other)

    return [(interpreter, "_get_np_dtype", numpy_dtype), (core.dtype, "__eq__", same)]


def _shapes(core: Any) -> list[tuple[Any, str, Any]]:
    """Tensors of one shape share the objects that describe it, which nobody changes; so do block types."""
    tensor_init, block_init, block_equal = core.tensor.__init__, core.block_type.__init__, core.block_type.__eq__
    of_tensors: dict[Any, Any] = {}
    of_blocks: dict[Any, Any] = {}

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        found = of_tensors.get(key)
        if found is None:
            tensor_init(self, handle, type)
            if vars(self).keys() == _TENSOR and len(of_tensors) < _SHAPES:
                of_tensors[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([x.value if type(x) is core.constexpr else x for x in shape])
        found = of_blocks.get(key) if all([type(x) is int for x in key]) else None
        if found is None:
            block_init(self, element_ty, shape)
            if vars(self).keys() == _BLOCK and len(of_blocks) < _SHAPES:
                of_blocks[tuple(self.shape)] = self.shape, self.numel, self.name.removesuffix(f"{element_ty}>")
            return
        self.element_ty = element_ty
        self.shape, self.numel, start = found
        self.name = f"{start}{element_ty}>"

    def equal(self: Any, other: Any) -> Any:
        if type(other) is core.block_type and self.shape is other.shape:
            return self.element_ty == other.element_ty
        return block_equal(self, other)

    kinds = [(core.tensor, "__init__", init_tensor), (core.block_type, "__init__", init_block)]
    return [*kinds, (core.block_type, "__eq__", equal)]
