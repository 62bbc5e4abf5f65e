"""How the decode kernel is launched: block sizes, warps, stages and splits, as data.

Everything here follows from what is static (shapes, dtype, GPU). The lengths are on the device, so one launch, and one
CUDA graph that holds it, must be good for every length up to the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from ...problem import Problem

MAX_ROWS = 64  #: queries times heads per K/V head; one tensor-core tile
MAX_SPLITS = 256  #: programs that share the keys of one K/V head; the combine kernel holds as many numbers
MIN_DOT = 16  #: the least size of each dim of a tensor-core product in Triton
MAX_KEYS = 128  #: keys per step at most: more make short rows pay for keys that are not there
MAX_SCORES = 4096  #: rows x keys of one step: more would crowd the registers


@dataclass(frozen=True, slots=True)
class Rule:
    """What one GPU architecture likes."""

    tile_bytes: int  #: size of the K tile of one step (and about that of the V tile)
    stages: int  #: steps being loaded or computed
    programs_per_sm: int  #: programs that are to be resident on each SM
    ragged: int  #: times as many programs when the rows' lengths differ, so that the SMs even out


#: By compute capability; set by arithmetic. To draw its share of the memory's bandwidth an SM must have latency x
#: bandwidth / SMs bytes under way, about 16 KiB on an H100. Two resident programs that each load one or two steps of
#: 2 x 16 KiB ahead have several times that, and fit the SM's shared memory: 227 KiB on 9.0 and 10.x, 163 KiB on 8.0.
RULES = {
    (8, 0): Rule(tile_bytes=16384, stages=2, programs_per_sm=2, ragged=4),
    (9, 0): Rule(tile_bytes=16384, stages=3, programs_per_sm=2, ragged=4),
    (10, 0): Rule(tile_bytes=16384, stages=3, programs_per_sm=2, ragged=4),
    (10, 3): Rule(tile_bytes=16384, stages=3, programs_per_sm=2, ragged=4),
}
DEFAULT = Rule(tile_bytes=8192, stages=2, programs_per_sm=2, ragged=4)  #: 99 KiB, as on 8.6, 8.9 and 12.0


@dataclass(frozen=True, slots=True)
class Launch:
    """One way of launching the kernel. The blocks are powers of two, at least `MIN_DOT`."""

    splits: int  #: programs per K/V head and batch entry; 1 writes the output at once, more need the combine kernel
    block_m: int  #: rows of the tile
    block_n: int  #: keys per step
    block_d: int  #: head dim, padded
    block_dv: int  #: value dim, padded
    warps: int
    stages: int


def rows(problem: Problem) -> int:
    """Rows of the tile that a K/V head's queries fill."""
    return problem.q_len * problem.group


@lru_cache(maxsize=1 << 12)
def choose(problem: Problem, sm_count: int) -> Launch:
    """The launch for a problem on a GPU with that many streaming multiprocessors."""
    p = problem
    rule = RULES.get(p.capability, DEFAULT)
    block_m, block_d, block_dv = _block(rows(p)), _block(p.head_dim), _block(p.value_dim)
    return Launch(
        splits=splits(p, sm_count),
        block_m=block_m,
        block_n=_block_n(p, rule),
        block_d=block_d,
        block_dv=block_dv,
        warps=8 if _many_registers(p, block_m, block_dv) else 4,
        # q's tile shares the memory with the steps in flight; at 64 KiB (float32) it takes one's place.
        stages=rule.stages - (block_m * block_d * p.dtype.itemsize >= 1 << 16),
    )


def splits(problem: Problem, sm_count: int) -> int:
    """Among how many programs the keys of each K/V head and batch entry are divided."""
    p = problem
    rule = RULES.get(p.capability, DEFAULT)
    ragged = p.batch > 1 and (p.kv_lengths or p.mask == "intervals")
    programs = sm_count * rule.programs_per_sm * (rule.ragged if ragged else 1)
    reach = p.kv_len
    if p.left >= 0 and p.right >= 0:  # the windows of q_len neighbours
        reach = min(reach, p.left + p.right + p.q_len)
    steps = -(-reach // _block_n(p, rule))
    return max(1, min(programs // (p.batch * p.kv_heads), steps, MAX_SPLITS))


def _block_n(p: Problem, rule: Rule) -> int:
    tile_bytes = rule.tile_bytes
    if p.dtype == torch.float32:  # without tensor cores the operands of a product sit in registers whole
        tile_bytes //= 2
    row_bytes = max(_block(p.head_dim), _block(p.value_dim)) * p.dtype.itemsize
    return max(MIN_DOT, min(MAX_SCORES // _block(rows(p)), MAX_KEYS, tile_bytes // row_bytes))


def _many_registers(p: Problem, block_m: int, block_dv: int) -> bool:
    """True when four warps would spill (as ptxas reports for 9.0)."""
    return p.dtype == torch.float32 or (block_m == MAX_ROWS and (block_dv > 128 or p.dense_mask))


def _block(size: int) -> int:
    return max(MIN_DOT, 1 << (size - 1).bit_length())


@cache
def sm_count(index: int) -> int:
    """Streaming multiprocessors of CUDA device `index`. Without a GPU (Triton's interpreter): 4, so that it splits."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 4
