"""How the work of the Hopper backward is split and ordered: chosen from a call's sizes by a model of its time.

A program's work is a number of steps, one for each tile of queries of each of its heads. The estimate of a choice is in
steps too, and has no jumps from one length to the next: lengths count as real numbers, and where another choice becomes
the best one both have the same estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from ....shape_cache import cached
from .binary import ROWS, keys_of

# Fitted to times on an H200, where a step takes 2.2 us: benchmarks/results/h200/hopper_backward_tune.json.
_FITTED = 128  #: the head dim of these times
L2 = 32 << 20  #: bytes that stay in the cache until they are read again
_OF_A_PROGRAM = 3.4  #: steps that its keys, its start and its end cost
_OF_A_BLOCK = 0.054  #: steps that clearing, adding to and rounding a block's sums takes, where programs share it
_APART = 0.24  #: of a step, where programs that work on the same heads are too far apart for the cache
_ALONE = 0.67  #: of a step, where no two programs work on the same heads, and all of the traffic goes to memory
_TAIL = 0.14  #: of the longest program: how long processors wait at the end, if the last section is small
_UNPAIRED = 0.145  #: as well, with one to two of the longest programs to a processor: short ones leave gaps
_TAIL_OF_EQUAL = 0.5  #: as well, where all programs are as long
_RAGGED = 3.0  #: times the tail, where batch entries have their own lengths: the longest may be in the last section
_BEHIND = 1.0  #: steps that a block is behind the one before it, where additions have an order: assumed, not fitted


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
    ordered: bool = False  #: additions have an order: see `order.py`
    ragged: bool = False  #: which of the tokens are there is data


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


@cached(1 << 10, "schedules of the Hopper backward")
def _best(s: Sizes) -> Choice:
    return min(candidates(s, splits(s)), key=lambda c: (estimate(s, c), c.split))


def splits(s: Sizes) -> tuple[int, ...]:
    """In how many programs the heads of a group can be split."""
    return tuple([n for n in (1, 2, 4, 8, 16) if s.group % n == 0])


def candidates(s: Sizes, parts: tuple[int, ...]) -> list[Choice]:
    """What is compared: sections of powers of two of heads, or all heads in one."""
    found = []
    for split in parts:
        heads = s.batch * s.kv_heads * split
        for section in (1 << i for i in range(heads.bit_length())):
            # The rest, in one section, keeps the processors busy to the end: long programs come first in it.
            keep = int((heads * blocks(s) - s.processors) / (section * blocks(s)))
            if section < heads and keep > 0:
                found.append(Choice(split, section, keep))
        found.append(Choice(split, heads, 0))
    return found


def blocks(s: Sizes) -> float:
    return max(1.0, s.kv_len / keys_of(s.dim))


def longest(s: Sizes) -> float:
    """Steps of the longest program, for one query head."""
    tiles = s.q_len / ROWS
    if s.left >= 0:
        tiles = min(tiles, (s.left + keys_of(s.dim)) / ROWS + 1)
    return max(1.0, tiles)


def mean(s: Sizes) -> float:
    """Steps of a program on average, for one query head."""
    top = longest(s)
    if not s.triangular:
        return top
    # Keys before the first query are seen by all; from there on each key by one query less.
    square = min(1.0, s.q_len / s.kv_len)
    return max(1.0, top * (1 - square) + (top / 2 + keys_of(s.dim) / ROWS / 2) * square)


def estimate(s: Sizes, c: Choice) -> float:
    """The time of a choice, in steps of a processor."""
    heads = s.batch * s.kv_heads * c.split
    programs = heads * blocks(s)
    share = s.group / c.split
    slower = 1.0 + _missed(s, c)
    even = (mean(s) * share * slower + _OF_A_PROGRAM) * programs / s.processors
    last = longest(s) * share * slower + _OF_A_PROGRAM
    sums = _OF_A_BLOCK * s.batch * s.kv_heads * blocks(s) if c.split > 1 else 0.0
    behind = _BEHIND * (_together(s, c) - 1) if s.ordered else 0.0
    # At least as long as the longest program.
    return max(even + _tail(s, c, even / last) * last, last) + sums + behind


def _tail(s: Sizes, c: Choice, longest_programs: float) -> float:
    """How long processors wait at the end on average, in longest programs; so many are one processor's even share."""
    waves = (s.batch * s.kv_heads * c.split - c.sections * c.section) * blocks(s) / s.processors  # of the last section
    if not s.triangular:
        return _TAIL_OF_EQUAL * min(1.0, s.batch * s.kv_heads * c.split * blocks(s) / s.processors)
    unpaired = max(0.0, 4 * (longest_programs - 1) * (2 - longest_programs))  # 1 in the middle
    tail = _TAIL * (_RAGGED if s.ragged else 1.0)
    return max(tail / max(1.0, waves / 1.5), _UNPAIRED * unpaired)


def _together(s: Sizes, c: Choice) -> float:
    """Blocks of one head that are at work at a time, where a section begins."""
    section = c.section if c.sections else s.batch * s.kv_heads * c.split
    return min(blocks(s), max(1.0, s.processors / section))


def _missed(s: Sizes, c: Choice) -> float:
    """What the traffic to memory adds to a step, of a step."""
    heads = s.batch * s.kv_heads * c.split
    of_a_head = s.group / c.split * s.q_len * s.dim * 8  # q, dO, and dQ in float32, of the query heads of a program
    # The programs of a head's blocks begin together but not at the same tile: all of its queries are in use meanwhile.
    at_work = min(heads, s.processors / blocks(s))
    apart = max(0.0, 1 - L2 / (at_work * of_a_head))

    def alone(section: int) -> float:
        """Between a head's blocks the others of its section have theirs; blocks that are at work together share."""
        return min(1.0, section / s.processors) * max(0.0, 1 - L2 / (section * of_a_head))

    before = c.sections * c.section
    rest = heads - before
    squares = (before * alone(c.section) ** 2 + (rest * alone(rest) ** 2 if rest else 0.0)) / heads
    # A step has as many scores times dims with wide heads as with others, but twice the queries' bytes for them.
    return (_APART * apart + _ALONE * squares) * (keys_of(_FITTED) / keys_of(s.dim))
