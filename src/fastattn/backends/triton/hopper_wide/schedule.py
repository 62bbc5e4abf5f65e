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
    tiles = p.batch * p.kv_heads * rows * blocks
    splits = _splits(p, tiles, sms, same)
    return Grid(queries, rows, blocks, splits, tiles * splits)


def _splits(p: Problem, tiles: int, sms: int, same: bool) -> int:
    """As many as take the least time. Only shapes are looked at: one launch serves all lengths."""
    most = p.kv_len
    if p.left >= 0 and p.right >= 0:
        most = min(most, p.left + p.right + ROWS)
    longest = -(-most // (2 * KEYS))
    # Under a causal mask with many queries tiles see half of the keys or more, and the longest come first.
    mean = 1 - min(p.q_len, most) / (2 * most) if p.causal else 1.0
    pair = _PAIR_SAME if same else _PAIR
    moved = 8 * p.batch * p.q_heads * p.q_len * p.value_dim  # bytes written and read, for each split

    def cycles(splits: int) -> float:
        part = -(-longest // splits)
        each = -(-tiles * splits // sms)
        if p.causal and p.q_len > 1:
            work = max(part * pair, mean * longest * pair * tiles / sms) + each * _ITEM
        else:
            work = each * (part * pair + _ITEM)
        return work + (_LAUNCH + splits * moved / _BYTES if splits > 1 else 0)

    limit = max(1, min(longest, MAX_SPLITS, max(4, 2 * sms // tiles)))
    best = min(range(1, limit + 1), key=cycles)
    return best if cycles(best) < _WORTH * cycles(1) else 1
