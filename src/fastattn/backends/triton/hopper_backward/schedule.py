"""How the work of the Hopper backward is split and ordered: chosen from a call's sizes by a model of its time.

A program's work is a number of steps, one for each tile of queries of each of its heads. The estimate of a choice is in
steps too, and has no jumps from one length to the next: lengths count as real numbers, and where another choice becomes
the best one both have the same estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .binary import KEYS, ROWS

L2 = 26 << 20  #: bytes that programs may work on at a time: half of an H100's cache
_OF_A_PROGRAM = 3.0  #: steps that its keys, its start and its end cost
_OF_A_SUM = 4.0  #: steps that adding its dK and dV up in memory costs, where programs share a block
_OF_A_BLOCK = 0.02  #: steps of all processors that clearing and rounding these sums takes, for each block
_MISSES = 0.25  #: of a step, where what a section's heads work on is many times the cache
_SMALL = 0.04  #: of a step, where sections are much smaller than the processors: long programs come late


class Choice(NamedTuple):
    split: int  #: programs that share a block of keys
    section: int  #: heads of a section, each as often as programs share it
    sections: int  #: of that many heads; one of the rest follows


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a call, as far as the choice depends on it."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    dim: int  #: padded
    triangular: bool  #: later keys are seen by fewer queries
    left: int = -1  #: of a window
    processors: int = 132


_forced: dict[str, int] = {}


@contextmanager
def forced(split: int = 0, section: int = 0, sections: int = -1) -> Iterator[None]:
    """Within the block kernels that are bound take this choice, as far as it is given: for measurements."""
    _forced.update(split=split, section=section, sections=sections)
    try:
        yield
    finally:
        _forced.clear()


def choose(s: Sizes) -> Choice:
    """The choice whose estimate is the least."""
    found = _best(s)
    if _forced:
        split = _forced["split"] or found.split
        heads = s.batch * s.kv_heads * split
        if _forced["split"] and s.group % split == 0:
            found = min(candidates(s, (split,)), key=lambda c: estimate(s, c))
        section = min(_forced["section"] or found.section, heads)
        sections = _forced["sections"] if _forced["sections"] >= 0 else min(found.sections, heads // section)
        found = Choice(found.split, section, min(sections, heads // section))
    return found


@lru_cache(1 << 10)
def _best(s: Sizes) -> Choice:
    return min(candidates(s, splits(s)), key=lambda c: (estimate(s, c), c.split))


def splits(s: Sizes) -> tuple[int, ...]:
    """In how many programs the heads of a group can be split."""
    return tuple([n for n in (1, 2, 4, 8, 16) if s.group % n == 0])


def candidates(s: Sizes, parts: tuple[int, ...]) -> list[Choice]:
    """What is compared: sections of powers of two of heads, of as many as fill the processors, or all heads in one."""
    found = []
    for split in parts:
        heads = s.batch * s.kv_heads * split
        powers = [1 << i for i in range(heads.bit_length())]
        wave = max(1, round(s.processors / blocks(s)))
        for section in sorted({*powers, wave, max(1, wave // 2)}):
            # The rest, in one section, keeps the processors busy to the end: long programs come first in it.
            keep = int((heads * blocks(s) - s.processors) / (section * blocks(s)))
            if section < heads and keep > 0:
                found.append(Choice(split, section, keep))
        found.append(Choice(split, heads, 0))
    return found


def blocks(s: Sizes) -> float:
    return max(1.0, s.kv_len / KEYS)


def longest(s: Sizes) -> float:
    """Steps of the longest program, for one query head."""
    tiles = s.q_len / ROWS
    if s.left >= 0:
        tiles = min(tiles, (s.left + KEYS) / ROWS + 1)
    return max(1.0, tiles)


def mean(s: Sizes) -> float:
    """Steps of a program on average, for one query head."""
    top = longest(s)
    if not s.triangular:
        return top
    # Keys before the first query are seen by all; from there on each key by one query less.
    square = min(1.0, s.q_len / s.kv_len)
    return max(1.0, top * (1 - square) + (top / 2 + 1) * square)


def estimate(s: Sizes, c: Choice) -> float:
    """The time of a choice, in steps of a processor."""
    heads = s.batch * s.kv_heads * c.split
    programs = heads * blocks(s)
    share = s.group / c.split
    extra = _OF_A_PROGRAM + (_OF_A_SUM if c.split > 1 else 0.0)
    slower = 1.0 + _MISSES * _missed(s, c)
    if c.sections:
        slower += _SMALL * max(0.0, 1.0 - c.section * blocks(s) / s.processors)
    sums = _OF_A_BLOCK * s.batch * s.kv_heads * blocks(s) if c.split > 1 else 0.0
    even = programs * (mean(s) * share * slower + extra) / s.processors
    last = longest(s) * share * slower + extra
    # The end, when some processors have nothing left: short programs come last, except where all are as long.
    tail = last * (0.25 if s.triangular else 0.5)
    few = min(1.0, programs / s.processors)  # with fewer programs than processors the longest one counts
    return max(even + tail * few, last) + sums


def _missed(s: Sizes, c: Choice) -> float:
    """How much of what a section's heads work on is not in the L2 cache, from 0 to 1."""
    of_a_head = s.group / c.split * s.q_len * s.dim * 8 + s.kv_len * s.dim * 4  # q, dO, dQ in float32; keys, values
    # A section and the next are at work together, until the processors are filled.
    at_once = min(s.batch * s.kv_heads * c.split, max(c.section, s.processors / blocks(s)))
    rest = s.batch * s.kv_heads * c.split - c.sections * c.section
    weight = c.sections * c.section / (c.sections * c.section + rest) if c.sections else 0.0
    over = [max(0.0, 1 - L2 / (n * of_a_head)) if n else 0.0 for n in (at_once, max(rest, 1))]
    return weight * over[0] + (1 - weight) * over[1]


def with_length(s: Sizes, length: int) -> Sizes:
    """The same call of another length, for as many queries as keys."""
    return replace(s, q_len=length, kv_len=length)
