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
    # To get what is not there costs os.environ an exception, 1 us.
    return os.environ[name] if name in os.environ else ""  # noqa: SIM401
