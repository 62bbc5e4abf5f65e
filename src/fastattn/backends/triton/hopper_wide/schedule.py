"""How the work of a call of wide heads is cut: tiles of rows, and programs that share the keys of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from ....call import Problem
from ....shape_cache import cached
from ..decode.launch_config import MAX_SPLITS
from .binary import KEYS, ROWS

#: Cycles of one multiprocessor, by arithmetic: a pair of blocks, where the values are the keys and where they are not
#: (the L2 cache brings about 28 bytes a cycle); the loads before a tile's first product and its stores; of the second
#: kernel its launch, and the bytes that it and the first one move in a cycle, all multiprocessors together.
_PAIR_SAME, _PAIR, _ITEM, _LAUNCH, _BYTES = 6000, 9500, 6000, 5000, 1700
_WORTH = 0.9  #: of the time without splits: more is not worth a second kernel
_MANY = 8  #: tiles of each multiprocessor, that even out by themselves


@dataclass(frozen=True, slots=True)
class Grid:
    """Items of work: see `tiles.py`."""

    queries: int  #: of a tile, each with ROWS / queries heads
    rows: int  #: tiles along the queries
    blocks: int  #: tiles along the heads of a group
    splits: int  #: programs that share the keys of a tile
    items: int


@cached(1 << 12, "launches")
def grid_of(p: Problem, sms: int, same: bool) -> Grid:
    """The cut of a problem's work on a GPU with so many multiprocessors. same: the values are the keys' first
    columns."""
    together = min(p.group & -p.group, ROWS)  # heads of a tile: a power of two that divides the group
    queries = ROWS // together
    rows, blocks = -(-p.q_len // queries), p.group // together
    each = p.batch * p.kv_heads * blocks
    splits = 1
    if each * rows <= _MANY * sms:
        splits = _splits(p, _pairs(p, queries, rows), each, sms, same)
    return Grid(queries, rows, blocks, splits, each * rows * splits)


def _pairs(p: Problem, queries: int, rows: int) -> list[int]:
    """Pairs of blocks that tiles see, the last queries first. Only shapes are looked at: one launch serves all
    lengths."""
    found = []
    for m in reversed(range(rows)):
        position = m * queries + p.kv_len - p.q_len
        end = p.kv_len if p.right < 0 else min(position + queries + p.right, p.kv_len)
        begin = 0 if p.left < 0 else max(position - p.left, 0)
        found.append(max(-(-(end - begin) // (2 * KEYS)), 1))
    return found


def _splits(p: Problem, pairs: list[int], each: int, sms: int, same: bool) -> int:
    """As many as take the least time. each: tiles of every number of pairs."""
    tiles, longest = len(pairs) * each, max(pairs)
    moved = 8 * p.batch * p.q_heads * p.q_len * p.value_dim  # bytes written and read, for each split
    pair = _PAIR_SAME if same else _PAIR

    def cycles(splits: int) -> float:
        programs = min(tiles * splits, sms)
        sums = [0] * programs
        t = 0
        for found in pairs:
            for split in range(each * splits):  # (their order among each other, and by blocks, counts little)
                turn, place = divmod(t, programs)
                steps = max(1, found // splits + (split % splits < found % splits))
                sums[programs - 1 - place if turn & 1 else place] += steps * pair + _ITEM
                t += 1
        return max(sums) + (_LAUNCH + splits * moved / _BYTES if splits > 1 else 0)

    limit = min(longest, MAX_SPLITS, max(4, 2 * sms // tiles))
    # Of those with as many pairs in the longest split, the fewest.
    choices = dict.fromkeys(-(-longest // -(-longest // splits)) for splits in range(1, limit + 1))
    best = min(choices, key=cycles)
    return best if cycles(best) < _WORTH * cycles(1) else 1
