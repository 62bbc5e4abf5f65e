"""What follows from a problem's shape alone, for whichever launch is chosen.

Of a call with `Segments` the same as of the one with Intervals that the kernel gets for it (`binding.with_intervals`).
"""

from __future__ import annotations

from ....call import Problem

MAX_ROWS = 64  #: queries times heads per K/V head of the tiles for few queries
FEW_QUERIES = 16  #: that are taken in blocks of rows without a softcap: where the heads alone fill a block, or are wide
WIDE = 256  #: head dims above it take launches of their own


def rows(problem: Problem) -> int:
    """Rows that a K/V head's queries are: queries times heads per K/V head."""
    return problem.q_len * problem.group


def is_wide(problem: Problem) -> bool:
    """True when the tiles of q, k and v fill the shared memory, and the output the registers."""
    return max(problem.head_dim, problem.value_dim) > WIDE


def many_heads(problem: Problem) -> bool:
    """True for few queries with more rows than a block has anywhere."""
    p = problem
    return rows(p) > MAX_ROWS and p.q_len <= FEW_QUERIES and (p.group > MAX_ROWS or is_wide(p))


def gaps(problem: Problem) -> bool:
    """True when between the first and the last key that a tile sees may lie keys that no row of it sees."""
    p = problem
    return p.dense_mask or (p.mask == "intervals" and p.mask_shape[1] > 1) or (p.mask == "segments" and p.q_len > 1)


def ragged(problem: Problem) -> bool:
    """True when the rows may be of different lengths."""
    p = problem
    return p.batch > 1 and (p.kv_lengths or p.mask in ("intervals", "segments"))


def reach(problem: Problem) -> int:
    """Keys that the queries of one tile see at the most."""
    p = problem
    windowed = p.left >= 0 and p.right >= 0 and p.mask != "segments"  # the windows of q_len neighbours
    return min(p.kv_len, p.left + p.right + p.q_len) if windowed else p.kv_len
