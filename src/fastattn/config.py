"""Environment variables, read at each call. One with a value that means nothing raises ValueError, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

ON = ("1", "on", "true", "yes")
OFF = ("0", "off", "false", "no")


def is_on(name: str, default: bool) -> bool:
    """What a variable says that is on or off; the default when it is not set or empty. ValueError: it says neither."""
    value = setting(name)
    if not value:
        return default
    return choice(name, (*ON, *OFF), "") in ON


def debugging() -> bool:
    """FASTATTN_DEBUG, for those who report errors: False where it says nothing, for that was reported already."""
    return not complaint(partial(is_on, "FASTATTN_DEBUG", False)) and is_on("FASTATTN_DEBUG", False)


def choice(name: str, choices: tuple[str, ...], default: str) -> str:
    """The one of `choices` that the variable names, in any case; the default when it is not set or empty."""
    value = setting(name)
    if not value:
        return default
    found = value.strip().lower()
    if found not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return found


def complaint(check: Callable[[], object]) -> str:
    """What is wrong with a variable, "" if nothing, found by reading it."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def setting(name: str) -> str:
    """The variable's value, "" when it is not set."""
    if _plain is None:
        return os.environ.get(name, "")
    # To ask os.environ for what is not there costs it an exception: 1 us, several times in each call of the op.
    value = _plain.get(os.environ.encodekey(name))
    return "" if value is None else os.environ.decodevalue(value)


#: What os.environ wraps, where it is as it has been since Python 3.2.
_plain = getattr(os.environ, "_data", None) if hasattr(os.environ, "encodekey") else None
