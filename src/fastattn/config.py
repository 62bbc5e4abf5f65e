"""Environment variables, read at each call. A value that is not allowed raises ValueError, which names the variable."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

ON = ("1", "on", "true", "yes")
OFF = ("0", "off", "false", "no")


def is_on(name: str, default: bool) -> bool:
    """The value of an on/off variable; the default when it is unset or empty.

    Raises ValueError, naming the variable, for a value that is neither in `ON` nor in `OFF`.
    """
    value = setting(name)
    if not value:
        return default
    return choice(name, (*ON, *OFF), "") in ON


def debugging() -> bool:
    """FASTATTN_DEBUG, for code that reports errors: False for a wrong value, which was reported before."""
    return not complaint(partial(is_on, "FASTATTN_DEBUG", False)) and is_on("FASTATTN_DEBUG", False)


def choice(name: str, choices: tuple[str, ...], default: str) -> str:
    """The variable's value, in lower case; the default when it is unset or empty.

    Raises ValueError, naming the variable, for a value that is not in `choices`.
    """
    value = setting(name)
    if not value:
        return default
    found = value.strip().lower()
    if found not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return found


def complaint(check: Callable[[], object]) -> str:
    """The message of the ValueError that `check` raises; "" if it raises none."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def setting(name: str) -> str:
    """The variable's value; "" when it is unset."""
    if _plain is None:
        return os.environ.get(name, "")
    # os.environ raises and catches an exception for a variable that is unset: 1 us, several times in each call.
    value = _plain.get(_encoded(name))
    return "" if value is None else os.environ.decodevalue(value)


def any_set(*names: str) -> bool:
    """Whether one of the variables is set to something: what a call asks first, quicker than for their values."""
    if _plain is None:
        return any(setting(name) for name in names)
    for name in names:  # noqa: SIM110 (a generator takes three times as long)
        if _plain.get(_encoded(name)):
            return True
    return False


#: The dict that os.environ wraps; None in a Python where os.environ is built in another form.
_plain = getattr(os.environ, "_data", None) if hasattr(os.environ, "encodekey") else None


@cache
def _encoded(name: str) -> Any:
    """The name as that dict has it."""
    return os.environ.encodekey(name)
