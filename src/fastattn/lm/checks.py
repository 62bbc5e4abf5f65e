"""Checks of arguments: each raises ValueError that names the argument and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from typing import Any


def check_int(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """The argument as an int, one of numpy's or torch's included. Bools and floats are refused."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r:.80}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")
    return value


def check_number(name: str, value: Any, fits: Any, within: str) -> float:
    """The argument as a float. fits: whether a float is in the range that `within` describes; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):
        raise ValueError(f"{name}: expected a number {within}, got {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool | None:
    """The argument, which is True, False or None."""
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{name}: expected True, False or None, got {value!r}")


def check_ids(name: str, ids: Any) -> list[int]:
    """Token ids as ints: any sequence of whole numbers, or a tensor `[P]` of them."""
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise ValueError(f"{name}: expected token ids, got {ids!r:.50}")
    if hasattr(ids, "tolist"):  # a tensor or an array: one copy to the host instead of one for each token
        ids = ids.tolist()
        if not isinstance(ids, list):
            raise ValueError(f"{name}: expected token ids [tokens], got a single number")
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{name}: expected token ids, whole numbers in one dimension, got {list(ids)!r:.80}") from None


def check_sequence(name: str, value: Any, what: str) -> Sequence[Any]:
    """The argument as a list; what: its elements, for the message. Strings are refused."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name}: expected a list of {what}, got {value!r:.80}")
    return list(value)
