"""The memory that one call of the Hopper backward works with, in one piece that lives until its last launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ....call import Problem
from .binary import KEYS, ROWS

_ALIGNMENT = 256  #: bytes, of each part


def tiles_of(p: Problem) -> int:
    return -(-p.q_len // ROWS)


def blocks_of(p: Problem) -> int:
    return -(-p.kv_len // KEYS)


def rows_of(p: Problem) -> int:
    """Tiles of queries, of all heads."""
    return p.batch * p.q_heads * tiles_of(p)


class Memory:
    """Where the pieces of one call's memory lie: bytes from its beginning, and in all."""

    def __init__(self, p: Problem, dim: int, split: bool, bounds: int) -> None:
        """bounds: bytes of what `Bounds` fills, 0: there are none."""
        self.size = 0
        rows, blocks = rows_of(p), p.batch * p.kv_heads * blocks_of(p)
        self.bounds = self._add(bounds)
        self.extents = self._add(4 * p.batch * (4 * blocks_of(p) + tiles_of(p) + KEYS * blocks_of(p)) if bounds else 0)
        self.rows = self._add(4 * rows * 2 * ROWS)
        self.sinks = self._add(4 * rows if p.sinks else 0)
        self.dq = self._add(4 * rows * ROWS * dim)
        self.dkv = self._add(4 * 2 * blocks * KEYS * dim if split else 0)
        self.clean_q = self._add(2 * rows * ROWS * dim if bounds else 0)
        self.clean_grad_out = self._add(2 * rows * ROWS * dim if bounds else 0)

    def _add(self, size: int) -> tuple[int, int]:
        begin = self.size
        self.size += -(-size // _ALIGNMENT) * _ALIGNMENT
        return begin, begin + size

    @staticmethod
    def piece(memory: Tensor, place: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """That piece of the memory, or None where there is no such thing."""
        return memory[place[0] : place[1]].view(dtype) if place[1] > place[0] else None
