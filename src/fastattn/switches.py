"""Environment variables that are on or off."""

from __future__ import annotations

import os

OFF = ("0", "off", "false", "no")


def is_on(name: str, default: bool) -> bool:
    """False when the variable says 0, off, false or no; the default when it is not set or empty."""
    value = os.environ.get(name)
    return value.lower() not in OFF if value else default
