"""Reads result files, which a stranger may have written: their content is data, and an error is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastattn.common.printable import printable

MOST_BYTES = 16 << 20  #: of a result file; ours have up to 0.1 MB
MOST_TEXT = 1000  #: characters of one text in a result file
#: Names in older result files -> the names that replaced them.
FORMER = {
    "fastattn-any": "fastattn-dynamic",
    "fastattn-exact": "fastattn-static",
    "any/exact": "dynamic/static",
    "any/exact eager": "dynamic/static eager",
    "/ best torch": "/ best other",
}


def load(path: str | Path) -> dict[str, Any]:
    """The content of a result file, as data that is fit to be shown. Raises ValueError naming it when it is not
    there or none."""
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)  # a pipe is read as well; /dev/zero would never end
        if len(text) > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        found = json.loads(text.decode("utf-8"), parse_float=_finite, parse_int=_whole, parse_constant=_no)
        found = renamed(shown(found))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(found, dict) or not {"benchmark", "environment"} <= set(found):
        raise ValueError(f'{path}: expected a result file of fastattn, with "benchmark" and "environment" in it')
    if not isinstance(found["environment"], dict):
        raise ValueError(f'{path}: expected an object as "environment", got {type(found["environment"]).__name__}')
    return found


def shown(value: Any) -> Any:
    """A value of a JSON file, every text in it in one printable line of some length."""
    if isinstance(value, str):
        text = printable(value[: MOST_TEXT + 1])
        return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
    if isinstance(value, list):
        return [shown(inner) for inner in value]
    return {shown(key): shown(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def renamed(value: Any) -> Any:
    """A value of a JSON file with the names of today."""
    if isinstance(value, list):
        return [renamed(inner) for inner in value]
    if isinstance(value, dict):
        return {FORMER.get(key, key): renamed(inner) for key, inner in value.items()}
    return value


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no(text)


def _whole(text: str) -> int:
    return int(text) if len(text) <= 20 else _no(text[:20])


def _no(text: str) -> Any:
    raise ValueError(f"{text} is no number that is measured")


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Whatever a result file leads to that is not as fastattn writes it, a ValueError says in one line, naming it."""
    try:
        yield
    except ImportError:
        raise  # no matplotlib
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: expected a result file as fastattn writes it, got one that gives {what}") from error
