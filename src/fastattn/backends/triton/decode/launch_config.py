"""How the decode kernel is launched: block sizes, warps, stages and splits, as data.

Everything here follows from what is static (shapes, dtype, GPU). The lengths are on the device, so one launch, and one
CUDA graph that holds it, must be good for every length up to the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ....call import Problem
from ....shape_cache import cached

#: Queries times heads per K/V head; one tensor-core tile. Where there are more, blocks of as many: with a softcap, 2048
#: queries of 32/8 heads take 223 us, in blocks of 128 rows 269 (torch's flex attention: 250).
MAX_ROWS = 64
MOST_BLOCKS = 65535  #: of rows: what CUDA allows along the third dim of a grid
MAX_SPLITS = 256  #: programs that share the keys of one K/V head; the combine kernel holds as many numbers
MIN_DOT = 16  #: the least size of each dim of a tensor-core product in Triton
MAX_KEYS = 128  #: keys per step at most: more make short rows pay for keys that are not there
MAX_SCORES = 2048  #: rows x keys of one step: more crowd the registers (64 x 32 against 64 x 64: 13.8 us for 17.5)


@dataclass(frozen=True, slots=True)
class Rule:
    """What one GPU architecture likes."""

    tile_bytes: int  #: size of the K tile of one step (and about that of the V tile)
    stages: int  #: steps being loaded or computed
    programs_per_sm: int  #: programs among which the work is divided, for each SM
    ragged: int  #: the same when the rows' lengths differ, so that the SMs even out
    crowd_bytes: int  #: the K tile when there are more K/V heads than SMs: many programs of two warps fit each


#: By compute capability. 9.0 is measured (`python -m benchmarks.tune decode`, benchmarks/results/h100/
#: tune-decode.json): one program for each SM with 2 x 16 KiB in flight beats two, in which the combine kernel reads
#: twice as much; only heads of 64 numbers want two. The others are set by arithmetic: to draw its share of the memory's
#: bandwidth an SM must have latency x bandwidth / SMs bytes under way, about 16 KiB, and the steps in flight have to
#: fit its shared memory, 227 KiB on 10.x and 163 KiB on 8.0.
RULES = {
    (8, 0): Rule(tile_bytes=16384, stages=2, programs_per_sm=2, ragged=8, crowd_bytes=16384),
    (9, 0): Rule(tile_bytes=16384, stages=3, programs_per_sm=1, ragged=8, crowd_bytes=8192),
    (10, 0): Rule(tile_bytes=16384, stages=3, programs_per_sm=1, ragged=8, crowd_bytes=8192),
    (10, 3): Rule(tile_bytes=16384, stages=3, programs_per_sm=1, ragged=8, crowd_bytes=8192),
}
#: 99 KiB, as on 8.6, 8.9 and 12.0
DEFAULT = Rule(tile_bytes=8192, stages=2, programs_per_sm=2, ragged=8, crowd_bytes=8192)


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


@cached(1 << 12, "launches")
def choose(problem: Problem, sm_count: int) -> Launch:
    """The launch for a problem on a GPU with that many streaming multiprocessors."""
    p = problem
    rule = RULES.get(p.capability, DEFAULT)
    block_m, block_d, block_dv = _rows_of_a_block(p), _block(p.head_dim), _block(p.value_dim)
    crowded = _crowded(p, rule, sm_count)
    # q's tile shares the memory with the steps in flight; at 64 KiB (float32) it takes one's place. Steps of many rows
    # are small ones; but with several blocks of rows programs share an SM (2048 queries: 266 us with four stages, 223
    # with three).
    stages = rule.stages - (block_m * block_d * p.dtype.itemsize >= 1 << 16)
    full = MAX_ROWS // 2 < rows(p) <= MAX_ROWS
    many_rows = full and p.dtype != torch.float32 and block_dv <= 128 and rule.stages > 2
    return Launch(
        splits=splits(p, sm_count),
        block_m=block_m,
        block_n=_block_n(p, rule, crowded),
        block_d=block_d,
        block_dv=block_dv,
        warps=8 if _many_registers(p, block_m, block_dv) else 2 if crowded else 4,
        stages=stages + many_rows,
    )


def splits(problem: Problem, sm_count: int) -> int:
    """Among how many programs the keys of each K/V head and batch entry are divided."""
    p = problem
    if rows(p) > MAX_ROWS:
        return 1
    rule = RULES.get(p.capability, DEFAULT)
    per_sm = rule.ragged if _ragged(p) else max(rule.programs_per_sm, 1 + _fine(p))
    block_n = _block_n(p, rule, _crowded(p, rule, sm_count))
    steps = -(-_reach(p) // block_n)
    if not _narrow(p, block_n):  # with one split the kernel is another: a growing cache must not compile it anew
        steps = max(2, steps)
    return max(1, min(sm_count * per_sm // (p.batch * p.kv_heads), steps, MAX_SPLITS))


def _ragged(p: Problem) -> bool:
    """True when the rows may be of different lengths."""
    return p.batch > 1 and (p.kv_lengths or p.mask == "intervals")


def _reach(p: Problem) -> int:
    """Keys that the queries of one tile see at the most."""
    windowed = p.left >= 0 and p.right >= 0  # the windows of q_len neighbours
    return min(p.kv_len, p.left + p.right + p.q_len) if windowed else p.kv_len


def _narrow(p: Problem, keys: int) -> bool:
    """True when a window lets a tile see no more than so many keys, however many there are."""
    return p.left >= 0 and p.right >= 0 and p.left + p.right + p.q_len <= keys


def _fine(p: Problem) -> bool:
    """True for keys of few bytes: smaller steps and twice the programs load them faster (12.5 us to 11.8)."""
    return _row_bytes(p) <= 128 and not _narrow(p, MAX_KEYS)


def _crowded(p: Problem, rule: Rule, sm_count: int) -> bool:
    """True when every SM has a K/V head to itself and more: no splits, and what counts is how many programs fit."""
    half = p.dtype != torch.float32 and _rows_of_a_block(p) == MIN_DOT
    return half and not _ragged(p) and rule.crowd_bytes < rule.tile_bytes and p.batch * p.kv_heads > sm_count


def _block_n(p: Problem, rule: Rule, crowded: bool) -> int:
    tile_bytes = rule.crowd_bytes if crowded else rule.tile_bytes
    if p.dtype == torch.float32:  # without tensor cores the operands of a product sit in registers whole
        tile_bytes //= 2
    most = MAX_KEYS // 2 if _fine(p) else MAX_KEYS
    return max(MIN_DOT, min(MAX_SCORES // _rows_of_a_block(p), most, tile_bytes // _row_bytes(p)))


def _row_bytes(p: Problem) -> int:
    """Of one key or value in the kernel's blocks."""
    return max(_block(p.head_dim), _block(p.value_dim)) * p.dtype.itemsize


def _many_registers(p: Problem, block_m: int, block_dv: int) -> bool:
    """True when four warps would spill (as ptxas reports for 9.0)."""
    return p.dtype == torch.float32 or (block_m == MAX_ROWS and (block_dv > 128 or p.dense_mask))


def _rows_of_a_block(p: Problem) -> int:
    return min(_block(rows(p)), MAX_ROWS)


def _block(size: int) -> int:
    return max(MIN_DOT, 1 << (size - 1).bit_length())


@cache
def sm_count(index: int) -> int:
    """Streaming multiprocessors of CUDA device `index`. Without a GPU (Triton's interpreter): 4, so that it splits."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 4
