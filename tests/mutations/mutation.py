"""What a deliberate mistake is."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake."""

    name: str
    file: str  #: under src/fastattn
    old: str  #: text that occurs in it once
    new: str
    tests: tuple[str, ...]  #: arguments of pytest
