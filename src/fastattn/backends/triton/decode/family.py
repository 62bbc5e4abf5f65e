"""Problems that differ in lengths and batch alone: as many as need all binaries that any of them needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ....call import Problem
from .chunks import MOST_QUERIES, is_chunk
from .launch_config import fits
from .shapes import FEW_QUERIES, MAX_ROWS

_LONG = 1 << 15  #: keys that are worth dividing
_MANY = 8  #: programs per SM, from which on no rule divides the keys of a tile any more


def family(problem: Problem, sm_count: int) -> Iterator[Problem]:
    """The problem itself, then others that this kernel takes, with every number of queries that a rule of
    `launch_config.py` tells apart, and batches on each side of each of its limits.

    (The number of keys picks none: with few there are as many splits as with many, of which some are empty. But it
    takes many to make a chunk.)
    """
    p = problem
    yield p
    yield from _chunks(p)
    even = sm_count // p.kv_heads  #: entries that fill the SMs once
    some = [max(1, even // 8)]  # as many as leave each entry few splits
    some += [max(1, even * part // 4) for part in (4, 5, 6, 8)]  # some more do not even out, and are divided
    batches = dict.fromkeys([p.batch, 1, 2, *some, even + 1, _MANY * sm_count + 1])
    for q_len in _numbers_of_queries(p):
        if q_len == p.q_len or fits(replace(p, q_len=q_len)):
            for batch in batches:
                yield resized(p, batch, q_len)


def _numbers_of_queries(p: Problem) -> Iterable[int]:
    """All that a rule tells apart: those around the last row of a tile; with a window, which they widen, every one."""
    if p.left >= 0 and p.right >= 0:
        return range(1, MAX_ROWS + 2)  # beyond it nothing changes any more
    last = [rows // p.group for rows in (MAX_ROWS // 4, MAX_ROWS // 2, MAX_ROWS)]
    sides = {1, 2, *last, *(n + 1 for n in last), FEW_QUERIES, FEW_QUERIES + 1, MAX_ROWS + 1}
    return sorted(sides - {0})


def _chunks(p: Problem) -> Iterator[Problem]:
    """One, if there are any. They differ in nothing that picks a binary but the number of splits, one or more."""
    few = FEW_QUERIES + 1 if p.group > MAX_ROWS else MAX_ROWS // p.group + 1
    for q_len in (few, 2 * few, 4 * few, 100, 200, MOST_QUERIES):
        for batch in (1, 2, 8, 64):
            other = replace(resized(p, batch, q_len), kv_len=max(p.kv_len, _LONG))
            if other.dense_mask and other.mask_shape[3] > 1:
                other = replace(other, mask_shape=(*other.mask_shape[:3], other.kv_len))
            if is_chunk(other):
                yield other
                return


def resized(p: Problem, batch: int, q_len: int) -> Problem:
    """The problem with another batch and another number of queries, its mask with it."""
    shape = list(p.mask_shape)
    if p.mask not in ("none", "segments") and shape[0] > 1:
        shape[0] = batch
    at = {"intervals": 1, "bool": 2, "additive": 2}.get(p.mask)
    if at is not None and shape[at] > 1:
        shape[at] = q_len
    return replace(p, batch=batch, q_len=q_len, mask_shape=tuple(shape))
