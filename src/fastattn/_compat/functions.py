"""Copies of other libraries' functions that use other values for some of their globals, decorators included.

transformers' attention modules call `apply_rotary_pos_emb` as a global of their module. A copy of one forward with
another function under that name leaves the module, and so every other model, unchanged. Callers compare the copy with
the original on numbers before they use it (`lm/fused_ops/rotary.py`).

A decorator that uses functools.wraps stores the function it wraps in `__wrapped__`, and calls it through its closure.
transformers 5.24 decorates nearly every forward so (`deprecate_kwarg`).
"""

from __future__ import annotations

from types import CellType, CodeType, FunctionType
from typing import Any


class NotCopied(TypeError):
    """A function cannot be copied, because of the way it is decorated."""


def innermost(function: Any) -> FunctionType:
    """The function below all decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def with_globals(function: Any, changes: dict[str, Any]) -> FunctionType:
    """A copy of a function, and of its decorators, whose innermost function finds other values for some globals.

    Raises NotCopied for a decorator that does not hold the function it wraps in its closure.
    """
    if not isinstance(function, FunctionType):
        raise NotCopied(f"something that is no function cannot be copied: {function!r:.80}")
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        scope = function.__globals__ | changes
        # torch.compile looks for the globals of a function with a __name__ in the module of that name.
        scope.pop("__name__", None)
        # torch.compile caches compiled functions by their code, together with names of globals of the first function
        # that had it: one code for two functions ends in a NameError.
        code = function.__code__.replace(co_name=f"{function.__name__}_with_other_globals")
        return _made(function, code, scope, function.__closure__)
    copy = with_globals(inner, changes)
    cells = function.__closure__ or ()
    closure = tuple(CellType(copy) if _contents(cell) is inner else cell for cell in cells)
    if closure == cells:
        raise NotCopied(f"{function.__qualname__} cannot be copied: it does not call what it wraps through its closure")
    made = _made(function, function.__code__, function.__globals__, closure)
    made.__dict__["__wrapped__"] = copy
    return made


def _made(
    function: FunctionType, code: CodeType, scope: dict[str, Any], closure: tuple[Any, ...] | None
) -> FunctionType:
    made = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return cell
