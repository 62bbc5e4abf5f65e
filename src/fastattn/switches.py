"""Environment variables, read at each call."""

from __future__ import annotations

import os

OFF = ("0", "off", "false", "no")


def is_on(name: str, default: bool) -> bool:
    """False when the variable says 0, off, false or no; the default when it is not set or empty."""
    value = setting(name)
    return value.lower() not in OFF if value else default


def setting(name: str) -> str:
    """The variable's value, "" when it is not set."""
    if _plain is None:
        return os.environ.get(name, "")
    # To ask os.environ for what is not there costs it an exception: 1 us, several times in each call of the op.
    value = _plain.get(os.environ.encodekey(name))
    return "" if value is None else os.environ.decodevalue(value)


#: What os.environ wraps, where it is as it has been since Python 3.2.
_plain = getattr(os.environ, "_data", None) if hasattr(os.environ, "encodekey") else None
