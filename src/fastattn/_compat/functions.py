"""Other libraries' functions, compared and copied: through their decorators, which wrap them in functions of their own.

A decorator that follows functools.wraps leaves the function in `__wrapped__`, and calls it through a variable of its
closure. transformers 5.24 decorates nearly every forward so (`deprecate_kwarg`): code that looks at the outermost
function alone finds all of them alike.
"""

from __future__ import annotations

from types import CellType, CodeType, FunctionType
from typing import Any

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 8  #: functions within functions; what goes on beyond that is taken for different


def same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two functions are, decorators and all, the same instructions on the same names and values.

    Global names are compared as names: what they stand for is the caller's to compare.
    """
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)) or depth > _DEEPEST:
        return False
    if one is other:
        return True
    if _code(one) != _code(other) or hasattr(one, "__wrapped__") != hasattr(other, "__wrapped__"):
        return False
    pairs = zip(one.__closure__ or (), other.__closure__ or ())
    return all(_alike(_contents(a), _contents(b), depth) for a, b in pairs)


def innermost(function: Any) -> FunctionType:
    """The function below all decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def copied(
    function: FunctionType, scope: dict[str, Any] | None = None, names: dict[str, str] | None = None
) -> FunctionType:
    """A copy whose innermost function has other globals, and in which names are replaced: old to new.

    A name is replaced wherever the innermost function uses it: as a variable or an argument of its own, as an
    attribute, as a keyword of a call, as a string. The decorators are copied with it.

    Raises:
        TypeError: it is decorated in another way than with a function that holds it in its closure.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        code = _renamed(function.__code__, names) if names else function.__code__
        if scope is not None:
            # torch.compile keeps what it has compiled by the code, with names that are among the globals of the
            # function that came first: one code for two functions ends in a NameError.
            code = code.replace(co_name=f"{function.__name__}_with_other_globals")
        return _made(function, code, function.__globals__ if scope is None else scope, function.__closure__)
    if not isinstance(inner, FunctionType):
        raise TypeError(f"{function.__qualname__} cannot be copied: it wraps something that is no function: {inner!r}")
    copy = copied(inner, scope, names)
    cells = function.__closure__ or ()
    closure = tuple(CellType(copy) if _contents(cell) is inner else cell for cell in cells)
    if closure == cells:
        raise TypeError(f"{function.__qualname__} cannot be copied: it does not call what it wraps through its closure")
    made = _made(function, function.__code__, function.__globals__, closure)
    made.__dict__["__wrapped__"] = copy
    return made


def uses(function: FunctionType, name: str) -> bool:
    """Whether the innermost function uses a name, as `copied` replaces it."""
    code = innermost(function).__code__
    return _renamed(code, {name: ""}) != code


def _made(
    function: FunctionType, code: CodeType, scope: dict[str, Any], closure: tuple[Any, ...] | None
) -> FunctionType:
    made = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _renamed(code: CodeType, names: dict[str, str]) -> CodeType:
    def new(old: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in old)

    def constant(x: Any) -> Any:  # keywords of calls are constants: one, or a tuple of them
        if isinstance(x, tuple) and all(isinstance(part, str) for part in x):
            return new(x)
        return names.get(x, x) if isinstance(x, str) else x

    constants: tuple[Any, ...] = tuple(constant(x) for x in code.co_consts)
    return code.replace(co_names=new(code.co_names), co_varnames=new(code.co_varnames), co_consts=constants)


def _code(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    constants = tuple((type(x), x) for x in code.co_consts if x != function.__doc__)
    return (code.co_code, code.co_names, constants, code.co_freevars, function.__defaults__, function.__kwdefaults__)


def _alike(one: Any, other: Any, depth: int) -> bool:
    if one is other:
        return True
    if isinstance(one, FunctionType):
        return same(one, other, depth + 1)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_alike(a, b, depth) for a, b in zip(one, other))
    if isinstance(one, (set, frozenset)):
        return all(isinstance(x, _PLAIN) for x in one | other) and one == other
    return isinstance(one, _PLAIN) and one == other


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return cell
