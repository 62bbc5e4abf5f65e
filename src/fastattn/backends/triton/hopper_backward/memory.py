"""The memory that one call of the Hopper backward works with, in one piece that lives until its last launch."""

from __future__ import annotations

import torch

from ....call import Problem
from ...scratch import Pieces
from .binary import ROWS, keys_of


def tiles_of(p: Problem) -> int:
    return -(-p.q_len // ROWS)


def blocks_of(p: Problem, dim: int) -> int:
    """Blocks of keys of one head. dim: padded."""
    return -(-p.kv_len // keys_of(dim))


def rows_of(p: Problem) -> int:
    """Tiles of queries, of all heads."""
    return p.batch * p.q_heads * tiles_of(p)


def pieces_of(p: Problem, dim: int, split: bool, bounds: int, ordered: bool = False) -> Pieces:
    """What one call's memory holds. bounds: bytes of what `Bounds` fills, 0: there are none."""
    rows, keys = rows_of(p), keys_of(dim)
    blocks = blocks_of(p, dim)
    of_all_heads = p.batch * p.kv_heads * blocks
    clean = 2 * rows * ROWS * dim if bounds else 0
    f32, i32 = torch.float32, torch.int32
    extents = p.batch * (4 * blocks + tiles_of(p) + keys * blocks) + (rows if p.masked_keys else 0)
    return Pieces(
        {
            "bounds": (bounds, i32),
            "extents": (4 * extents if bounds else 0, i32),
            "rows": (4 * rows * 2 * ROWS, f32),
            "sinks": (4 * rows if p.sinks else 0, f32),
            "dq": (4 * rows * ROWS * dim, f32),
            "dkv": (4 * 2 * of_all_heads * keys * dim if split else 0, f32),
            "counters": (4 * (rows + (of_all_heads if split else 0) + 1) if ordered else 0, i32),
            "clean_q": (clean, p.dtype),
            "clean_grad_out": (clean, p.dtype),
        }
    )
