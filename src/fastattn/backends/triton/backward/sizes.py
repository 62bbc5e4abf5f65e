"""The memory of a backward, and what its programs share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ....call import Problem
from ...scratch import Pieces
from . import launch_config
from .before import Before
from .launch_config import STAT_BLOCK, Launch


class Sizes:
    """The pieces of the memory that a backward needs, and how much each launch shares with others."""

    __slots__ = ("before", "bias_parts", "group_parts", "launch", "pieces", "row_blocks", "walk")

    def __init__(self, p: Problem, launch: Launch, first: int, before: Before, group_parts: int | None = None) -> None:
        """first: bytes that others use at the beginning. group_parts: if not as `launch_config` says."""
        self.launch, self.before = launch, before
        most = max(STAT_BLOCK, launch.keys.block_m, launch.queries.block_m, launch.bias.block_m)
        self.row_blocks = -(-p.q_len // most) * (most // STAT_BLOCK)
        keys = any(name in p.grads for name in "kv")
        self.group_parts = (group_parts or launch_config.group_parts(p, launch)) if keys else 1
        self.walk = Walk.of(p, launch) if "m" in p.grads else None
        self.bias_parts = 1 if self.walk is None else self.walk.parts
        wide = 4 * self.group_parts * p.batch * p.kv_len * p.kv_heads if self.group_parts > 1 else 0
        f32, i32 = torch.float32, torch.int32
        sizes = {
            "stats": ((12 if p.mask == "additive" else 8) * p.batch * p.q_heads * self.row_blocks * STAT_BLOCK, f32),
            "dsinks": (4 * p.batch * self.row_blocks * p.q_heads if "s" in p.grads else 0, f32),
            "dmask": (4 * self.bias_parts * math.prod(p.mask_shape) if self.bias_parts > 1 else 0, f32),
            "dk": (wide * p.head_dim if "k" in p.grads else 0, f32),
            "dv": (wide * p.value_dim if "v" in p.grads else 0, f32),
            "lists": (0 if before.lists is None else before.lists.size, torch.uint8),
            "key_lists": (before.key_lists_size, i32),
            "ranges": (before.ranges_size, i32),
        }
        self.pieces = Pieces(sizes, first)


class Walk(NamedTuple):
    """How the gradient of a mask is summed: see `bias_kernel`."""

    tiles: tuple[int, int]  #: of rows and of keys
    dims: tuple[int, int, int, int]  #: batch entries, heads, blocks of rows, blocks of keys that are summed
    each: int  #: of them that one program sums
    parts: int
    entries: bool  #: batch entries alone are walked, of a mask with rows and keys that is the same for all
    whole: bool  #: and a tile is all of an entry's queries and keys of a head: the pass over the mask is the only one

    @staticmethod
    def of(p: Problem, launch: Launch) -> Walk:
        batch, heads, rows, keys = (size > 1 for size in p.mask_shape)
        blocks = -(-p.q_len // launch.bias.block_m), -(-p.kv_len // launch.bias.block_n)
        tiles = blocks[0] if rows else 1, blocks[1] if keys else 1
        dims = (
            1 if batch else p.batch,
            1 if heads else p.q_heads,
            1 if rows else blocks[0],
            1 if keys else blocks[1],
        )
        walk, programs = math.prod(dims), p.mask_shape[0] * p.mask_shape[1] * math.prod(tiles)
        most = launch_config.MOST_PIECES // (4 * math.prod(p.mask_shape))
        wanted = max(1, min(walk, launch_config.PROGRAMS // programs, most))
        each = -(-walk // wanted)
        entries = not batch and rows and keys and dims[1] == 1
        return Walk(tiles, dims, each, -(-walk // each), entries, entries and tiles == (1, 1) and p.group == 1)
