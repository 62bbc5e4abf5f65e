"""Chunks: more rows than a tile for few queries has, against so many keys that they are worth dividing.

A piece of a prompt over a cache, a question about a long document, the drafts of speculative decoding. Kernels for many
queries have a program for each 128 queries of a head, which goes through all keys: 32 queries of 32 heads are 32
programs, a quarter filled, on 132 multiprocessors. Here the heads of a group are rows of one tile, and the keys are
divided among all multiprocessors.

Which of the two is quicker follows from a model of the time, and so does the number of splits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....call import Problem
from ....shape_cache import cached
from ..limits import usual_sm_count
from ..tile_parts import parts
from .shapes import MAX_ROWS, gaps, is_wide, many_heads, reach, rows

MANY_ROWS = 128  #: of a tile: two groups of four warps with 64 rows each, as Hopper's products take them
MOST_ROWS = 1 << 13  #: beyond them there is work for everybody (and the combine kernel has a program for each)
#: Queries, and the keys that are not worth dividing: whatever the heads, a call with more of the one or no more of the
#: other is no chunk. (As many: so that `warmup` can name calls that other kernels serve.)
MOST_QUERIES = LEAST_KEYS = 512
_BLOCK = 128  #: queries and keys by which times are counted
_HEAD = 256  #: numbers of a key and its value by which they are
_LEAST = 0.6  #: of a block's time that stays with smaller heads: the softmax

#: Keys of a step, and stages, of tiles of `MANY_ROWS`, by the larger of head and value dim, padded.
STEPS = {64: (64, 4), 128: (64, 3), 192: (64, 3), 256: (64, 2)}


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds on an H100 or H200. On another GPU the times are others, their ratios about the same."""

    other: float = 1.45  #: a program of another kernel: 128 queries of a head against 128 keys
    many: float = 3.0  #: a program of this kernel: a tile of `MANY_ROWS`, 128 keys
    few: float = 3.0  #: a tile of fewer
    start: float = 1.5  #: of a program, until its first keys are there
    again: float = 3.0  #: the kernel that combines splits
    exchanged: float = 2.5e6  #: bytes that splits leave and the second kernel reads, a microsecond
    read: float = 3.5e6  #: bytes of keys and values, a microsecond
    gain: float = 0.85  #: part of the other kernel's time that this one has to promise


COSTS = Costs()


def is_chunk(problem: Problem) -> bool:
    """True when this kernel is probably quicker than those that do not divide the keys, though it takes several tiles
    or one of `MANY_ROWS`. (float32 is not: here each of its products is exact by itself, and slow.)"""
    p = problem
    if not MAX_ROWS < rows(p) <= MOST_ROWS or p.q_len > MOST_QUERIES or many_heads(p):
        return False
    if p.capability == (0, 0):  # Triton's interpreter takes what there is a kernel for
        return True
    return p.dtype.itemsize == 2 and reach(p) > LEAST_KEYS and _promising(p)


@cached(1 << 12, "chunks")
def _promising(p: Problem) -> bool:
    here, elsewhere = times(p, usual_sm_count(p.capability))
    return here <= COSTS.gain * elsewhere


def times(problem: Problem, sm_count: int) -> tuple[float, float]:
    """What this kernel and another one take by the model, microseconds."""
    p = problem
    return _time(p, divided(p, sm_count), sm_count), _time_elsewhere(p, sm_count)


def tile_rows(problem: Problem) -> int:
    """Rows of the tiles of a chunk; heads not wide."""
    p = problem
    many = p.capability[0] == 9 and p.dtype.itemsize == 2 and not gaps(p)
    return MANY_ROWS if many else MAX_ROWS


def divided(problem: Problem, sm_count: int) -> int:
    """Among how many programs the keys of each K/V head, batch entry and tile of rows are divided.

    One or more than one does not depend on the number of keys, because that takes another binary.
    """
    p, tiles = problem, _tiles(problem)
    most = sm_count // tiles
    found = most
    if most <= 1:  # more than one round of programs: the last one should be full
        long = max(p.kv_len, 1 << 14)
        found = min(range(1, 5), key=lambda n: _time(p, n, sm_count, long))
    return min(found, max(2, -(-reach(p) // _BLOCK)))


def _tiles(p: Problem) -> int:
    return p.batch * p.kv_heads * -(-rows(p) // tile_rows(p))


def _time(p: Problem, splits: int, sms: int, keys: int = 0) -> float:
    """Of this kernel. keys: 0, or how many there are to be."""
    keys, tiles = keys or reach(p), _tiles(p)
    step = COSTS.many if tile_rows(p) == MANY_ROWS and not is_wide(p) else COSTS.few
    program = COSTS.start + keys / splits / _BLOCK * step * _width(p)
    computing = -(-tiles * splits // sms) * program
    combining = 0.0
    if splits > 1:
        left = 8 * splits * p.batch * p.kv_heads * rows(p) * p.value_dim
        combining = COSTS.again + left / COSTS.exchanged
    return max(computing, _reading(p, keys)) + combining


def _time_elsewhere(p: Problem, sms: int) -> float:
    keys, tiles = reach(p), p.batch * p.q_heads * -(-p.q_len // _BLOCK)
    program = COSTS.start + -(-keys // _BLOCK) * COSTS.other * _width(p)
    return max(-(-tiles // sms) * program, _reading(p, keys))


def _reading(p: Problem, keys: int) -> float:
    return p.batch * p.kv_heads * keys * (p.head_dim + p.value_dim) * p.dtype.itemsize / COSTS.read


def _width(p: Problem) -> float:
    return max(_LEAST, (p.head_dim + p.value_dim) / _HEAD)


def steps_of(problem: Problem) -> tuple[int, int]:
    """Keys of a step, and stages, of tiles of `MANY_ROWS`."""
    size = max(sum(parts(problem.head_dim)), sum(parts(problem.value_dim)))
    return next(found for dim, found in STEPS.items() if size <= dim)
