"""How the decode kernel is launched: block sizes, warps, stages and splits, as data.

Everything here follows from what is static (shapes, dtype, GPU). The lengths are on the device, so one launch, and one
CUDA graph that holds it, must be good for every length up to the capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ....call import Problem
from ....shape_cache import cached
from ..limits import usual_shared_memory
from ..tile_parts import MIN_PART, parts
from .chunks import MANY_ROWS, divided, is_chunk, steps_of, tile_rows
from .shapes import FEW_QUERIES, MAX_ROWS, gaps, is_wide, many_heads, ragged, reach, rows

# Where there are more than MAX_ROWS, blocks of as many: with a softcap, 2048 queries of 32/8 heads take 223 us, in
# blocks of 128 rows 269 (torch's flex attention: 250). Chunks take larger ones, see `chunks.py`.
MOST_BLOCKS = 65535  #: of rows: what CUDA allows along the third dim of a grid
MAX_SPLITS = 256  #: programs that share the keys of one K/V head; the combine kernel holds as many numbers
MIN_DOT = MIN_PART
MOST_EVENED = 4  #: programs per SM, up to which splits are chosen so that the SMs even out: as many are there at once
WORTHWHILE = 0.7  #: of the time, for which keys are split and combined
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
    alone_bytes: int = 0  #: the K tile of few rows when each SM has one program at most; 0: as else


#: By compute capability. 9.0 is measured (`python -m benchmarks.tune decode`, benchmarks/results/h100/tune-decode.json,
#: and `python -m benchmarks.tune_chunks`, benchmarks/results/h200/tune-chunks.json): one program for each SM beats two,
#: in which the combine kernel reads twice as much; only heads of 64 numbers want two. On an H200 2 x 32 KiB in flight
#: beat 2 x 16 (36.8 us for 38.7, 65.8 for 70.0), and where there are more K/V heads than SMs, each with all its keys,
#: four warps with 16 KiB beat two with 8 (62.8 for 64.8). The others are set by arithmetic: to draw its share of the
#: memory's bandwidth an SM must have latency x bandwidth / SMs bytes under way, about 16 KiB, and the steps in flight
#: have to fit its shared memory, 227 KiB on 10.x and 163 KiB on 8.0.
RULES = {
    (8, 0): Rule(tile_bytes=16384, stages=2, programs_per_sm=2, ragged=8, crowd_bytes=16384),
    (9, 0): Rule(
        tile_bytes=16384,
        stages=3,
        programs_per_sm=1,
        ragged=8,
        crowd_bytes=8192,
        alone_bytes=32768,
    ),
    (10, 0): Rule(tile_bytes=16384, stages=3, programs_per_sm=1, ragged=8, crowd_bytes=8192),
    (10, 3): Rule(tile_bytes=16384, stages=3, programs_per_sm=1, ragged=8, crowd_bytes=8192),
}
#: For 99 KiB, as on 8.6, 8.9 and 12.0.
DEFAULT = Rule(tile_bytes=8192, stages=2, programs_per_sm=2, ragged=8, crowd_bytes=8192)


@dataclass(frozen=True, slots=True)
class Launch:
    """One way of launching the kernel. Blocks and parts are powers of two from `MIN_DOT` on; a second part may be 0."""

    splits: int  #: programs per K/V head, batch entry and block of rows; 1 writes the output at once, more are combined
    block_m: int  #: rows of the tile
    block_n: int  #: keys per step
    head: tuple[int, int]  #: columns of the parts of the head dim: see `tile_parts.py`
    value: tuple[int, int]  #: and of the value dim
    warps: int
    stages: int
    near: bool = False  #: the blocks of rows of a K/V head are neighbours in the grid, and may have splits
    meanwhile: bool = False  #: the kernel is launched while the one before it in the stream ends, and waits for it
    columns: int = 0  #: of a program of the second kernel: see `combination.py`


def fits(problem: Problem) -> bool:
    """True when the kernel takes as many queries: one block of rows, or several where others are worse at it. That is
    where they lack the softcap, where few queries have a group of heads that fills a block alone (other kernels read
    the keys once per head or do not split them), for few queries of wide heads, and for chunks."""
    p = problem
    blocks = -(-rows(p) // _rows_of_a_block(p))
    return rows(p) <= MAX_ROWS or (p.softcap > 0 and blocks <= MOST_BLOCKS) or _near(p)


def may_be_same(problem: Problem) -> bool:
    """True when the kernel can take the values from its tiles of the keys, if they are the keys' first columns in
    memory too. (Not in float32: with TF32 the operands in registers would be spilled.)"""
    p = problem
    if p.dtype == torch.float32 or p.value_dim > p.head_dim:
        return False
    head, value = parts(p.head_dim), _value_parts(p, _rows_of_a_block(p))
    return head[0] == value[0] and value[1] in (0, head[1])


@cached(1 << 12, "launches")
def choose(problem: Problem, sm_count: int, shared: int | None = None, same: bool = False) -> Launch:
    """The launch for a problem on a GPU with that many streaming multiprocessors.

    shared: bytes of shared memory that a program may have there; None: what is usual for the compute capability.
    same: the values are the keys' first columns, read once.
    """
    p = problem
    rule = RULES.get(p.capability, DEFAULT)
    block_m = _rows_of_a_block(p)
    head, value = parts(p.head_dim), _value_parts(p, block_m)
    if is_wide(p):
        keys, stages = _wide_steps(p, block_m, usual_shared_memory(p.capability) if shared is None else shared, same)
        near = rows(p) > block_m and (_few(p) or is_chunk(p))
        count = _wide_splits(p, block_m, keys, sm_count, same)
        found = Launch(count, block_m, keys, head, value, warps=8, stages=stages, near=near)
        return _overlapped(found, p, sm_count, same) if _few_rows(p, block_m) else found
    if block_m == MANY_ROWS:
        keys, stages = steps_of(p)
        return Launch(divided(p, sm_count), block_m, keys, head, value, warps=8, stages=stages, near=True)
    crowded = _crowded(p, rule, sm_count)
    # q's tile shares the memory with the steps in flight; at 64 KiB (float32) it takes one's place. Steps of many rows
    # are small ones; but with several blocks of rows programs share an SM (2048 queries: 266 us with four stages, 223
    # with three).
    stages = rule.stages - (block_m * sum(head) * p.dtype.itemsize >= 1 << 16)
    full = MAX_ROWS // 2 < rows(p) <= MAX_ROWS or _near(p)
    many_rows = full and p.dtype != torch.float32 and sum(value) <= 128 and rule.stages > 2
    return Launch(
        splits=splits(p, sm_count),
        block_m=block_m,
        block_n=_block_n(p, rule, sm_count),
        head=head,
        value=value,
        warps=8 if _many_registers(p, block_m, sum(value)) else 2 if crowded else 4,
        stages=stages + many_rows,
        near=_near(p),
    )


def splits(problem: Problem, sm_count: int) -> int:
    """Among how many programs the keys of each K/V head, batch entry and block of rows are divided; heads not wide."""
    p = problem
    blocks = -(-rows(p) // MAX_ROWS)
    if blocks > 1 and not _near(p):
        return 1
    if is_chunk(p):
        return divided(p, sm_count)
    rule = RULES.get(p.capability, DEFAULT)
    per_sm = rule.ragged if ragged(p) else max(rule.programs_per_sm, 1 + _fine(p))
    block_n = _block_n(p, rule, sm_count)
    steps = -(-reach(p) // block_n)
    if not _narrow(p, block_n):  # with one split the kernel is another: a growing cache must not compile it anew
        steps = max(2, steps)
    tiles = p.batch * p.kv_heads * blocks
    found = max(sm_count * per_sm // tiles, 1 if ragged(p) else _evened(tiles, sm_count))
    return max(1, min(found, steps, MAX_SPLITS))


def _evened(tiles: int, sm_count: int) -> int:
    """Splits of about as many tiles as SMs: one, but where more give the SM with most to do far less.

    (160 tiles of 64 numbers, Whisper's cross attention: 28 of 132 SMs have two, and take as long as if all had: 25.8
    us, torch's cuDNN 19.2.)
    """

    def most(splits: int) -> float:
        return -(-tiles * splits // sm_count) / splits

    tried = [n for n in range(1, MOST_EVENED + 1) if tiles * n <= MOST_EVENED * sm_count]
    best = min(tried, key=most, default=1)
    return best if most(best) <= WORTHWHILE * most(1) else 1


# --- wide heads


def _wide_steps(p: Problem, block_m: int, shared: int, same: bool) -> tuple[int, int]:
    """Keys of a step, and stages: the first of those listed that fits the shared memory."""
    asynchronous = block_m == MAX_ROWS  # Hopper's products: both operands are in shared memory, and one step more
    head, value, size = sum(parts(p.head_dim)), sum(_value_parts(p, block_m)), p.dtype.itemsize
    for keys, stages in _WIDE_FLOAT if size > 2 else _WIDE_SAME if same and asynchronous else _WIDE_STEPS:
        held = stages if asynchronous else max(1, stages - 1)
        numbers = block_m * head + held * keys * (head + (0 if same else value)) + block_m * keys
        if gaps(p) and size > 2:  # values that pass through registers to be cleared are stored again
            numbers += keys * value
        mask = 8 * block_m * keys if p.dense_mask else 0
        if numbers * size + mask + _WIDE_REST <= shared:
            return keys, stages
    return MIN_DOT, 1


#: Keys and stages, best first. 32 keys of 512 numbers, K and V, are 64 KiB: twice what an SM needs under way; and the
#: scores of one step of few rows are a chain of 32 products, however many keys it has.
_WIDE_STEPS = ((32, 3), (16, 3), (32, 2), (16, 2))
#: 64 rows and K alone (absorbed MLA): Hopper's products of 64 x 64 read q half as often as those of 64 x 32.
_WIDE_SAME = ((64, 2), *_WIDE_STEPS)
_WIDE_FLOAT = ((MIN_DOT, 2),)  #: float32: without tensor cores the operands of a product sit in registers whole
_WIDE_REST = 2048  #: bytes for what else the kernel exchanges
_WIDE_RAGGED = 2  #: programs per SM when the rows' lengths differ: more would write and read too much


def _wide_splits(p: Problem, block_m: int, keys: int, sm_count: int, same: bool) -> int:
    """As `splits`. A program needs an SM for itself. What each leaves for the combine kernel (rows x values, float32)
    is large here, so there are as many splits as make the time of both kernels least.

    In the time of a step an SM reads its keys, in that of a split the GPU writes and reads the output of all rows, in
    the L2 cache at about twice the memory's rate. steps / n + n x split / step is least at sqrt(steps x step / split).
    """
    blocks = -(-rows(p) // block_m)
    if blocks > 1 and not (_few(p) or is_chunk(p)):
        return 1
    steps = -(-reach(p) // keys)
    if _narrow(p, keys):
        return 1
    step = keys * (p.head_dim + (0 if same else p.value_dim)) * p.dtype.itemsize * sm_count
    split = p.batch * p.kv_heads * rows(p) * p.value_dim * 4
    most = sm_count * (_WIDE_RAGGED if ragged(p) else 1) // (p.batch * p.kv_heads * blocks)
    found = max(1, min(most, math.isqrt(steps * step // split), steps, MAX_SPLITS))
    found = -(-steps // -(-steps // found))  # as few as have the same number of steps
    return max(2, found) if most >= 2 else 1  # two even of one step: see `splits`


def _few_rows(p: Problem, block_m: int) -> bool:
    """True where reading takes so little that what waits for something else counts: one tile of 16 rows, on Hopper."""
    return block_m == MIN_DOT and p.dtype.itemsize == 2 and p.capability[0] == 9 and not gaps(p)


def _overlapped(launch: Launch, p: Problem, sm_count: int, same: bool) -> Launch:
    """As few things as can be wait for one another.

    Measured on an H200 (8 heads of 512 dims to one K/V head, 8192 keys): the second kernel of more programs takes 4.4
    us less, four warps and two chains together 0.7 to 0.9. Four warps: each reads q from the shared memory for its
    keys, and with eight two of them read the same 8 keys. The scores of 512 columns are two chains of 16 products, not
    one of 32. What costs time, too: to copy q with the keys of each step (1.2 us), and to launch the second kernel when
    the first one begins (1.3 us).
    """
    head = (256, 256) if launch.head == (512, 0) and not same else launch.head
    warps = 8 if sum(head) > 512 and not same else 4  # 576 and 512 would spill
    columns = _COLUMNS_OF_MANY if sm_count // (p.batch * p.kv_heads) > _MANY_SPLITS else _COLUMNS
    return replace(launch, head=head, warps=warps, meanwhile=True, columns=columns)


#: Columns of a program of the second kernel; with many splits fewer, so that it reads all that they left at once.
_COLUMNS, _COLUMNS_OF_MANY = 128, 32
_MANY_SPLITS = 32  #: as many as can be read at once with `_COLUMNS`


def _few(p: Problem) -> bool:
    """True when blocks of rows, if there are several, are side by side and have splits; heads wide."""
    return p.q_len <= FEW_QUERIES or rows(p) <= MAX_ROWS


def _near(p: Problem) -> bool:
    """True for several blocks of rows that are side by side and have splits."""
    return many_heads(p) or is_chunk(p)


# --- what they have in common


def _narrow(p: Problem, keys: int) -> bool:
    """True when a window lets a tile see no more than so many keys, however many there are."""
    return p.left >= 0 and p.right >= 0 and p.left + p.right + p.q_len <= keys


def _fine(p: Problem) -> bool:
    """True for keys of few bytes: smaller steps and twice the programs load them faster (12.5 us to 11.8)."""
    return _row_bytes(p) <= 128 and not _narrow(p, MAX_KEYS)


def _crowded(p: Problem, rule: Rule, sm_count: int) -> bool:
    """True when every SM has K/V heads to itself and what counts is how many programs fit: keys of few bytes, or heads
    whose keys are divided for the SMs to even out."""
    half = p.dtype != torch.float32 and _rows_of_a_block(p) == MIN_DOT
    crowd = half and not ragged(p) and rule.crowd_bytes < rule.tile_bytes and p.batch * p.kv_heads > sm_count
    return crowd and (_fine(p) or not rule.alone_bytes or _evened(p.batch * p.kv_heads, sm_count) > 1)


def _alone(p: Problem, rule: Rule, sm_count: int) -> bool:
    """True when a program of few rows has an SM to itself, and the measured larger tile fits. (Not by the number of
    keys: it picks no binary.)"""
    few = p.dtype.itemsize == 2 and not ragged(p) and _rows_of_a_block(p) == MIN_DOT and not p.dense_mask
    return few and 128 < _row_bytes(p) <= 256 and p.batch * p.kv_heads <= sm_count


def _block_n(p: Problem, rule: Rule, sm_count: int) -> int:
    tile_bytes = rule.crowd_bytes if _crowded(p, rule, sm_count) else rule.tile_bytes
    if rule.alone_bytes and _alone(p, rule, sm_count):
        tile_bytes = rule.alone_bytes
    if p.dtype == torch.float32:  # without tensor cores the operands of a product sit in registers whole
        tile_bytes //= 2
    most = MAX_KEYS // 2 if _fine(p) else MAX_KEYS
    keys = 1 << (tile_bytes // _row_bytes(p)).bit_length() >> 1  # a power of two
    return max(MIN_DOT, min(MAX_SCORES // _rows_of_a_block(p), most, keys))


def _row_bytes(p: Problem) -> int:
    """Of one key or value in the kernel's blocks."""
    return max(sum(parts(p.head_dim)), sum(_value_parts(p, _rows_of_a_block(p)))) * p.dtype.itemsize


def _value_parts(p: Problem, block_m: int) -> tuple[int, int]:
    """A second part of no more columns than rows would be computed by all warps alike, each for itself (ptxas: 195
    registers for 100, four times the products), except by Hopper's products of 64 rows each."""
    return parts(p.value_dim, MIN_PART if block_m >= MAX_ROWS else 2 * block_m)


def _many_registers(p: Problem, block_m: int, columns: int) -> bool:
    """True when four warps would spill (as ptxas reports for 9.0)."""
    return p.dtype == torch.float32 or (block_m == MAX_ROWS and (columns > 128 or p.dense_mask))


def _rows_of_a_block(p: Problem) -> int:
    most = MAX_ROWS
    if is_wide(p):
        # 64 rows of 512 columns are 128 registers a thread. With Hopper's products, whose operands are in the shared
        # memory, that leaves room for the rest, unless there are gaps to be cleared in values and scores.
        most = MIN_DOT if p.dtype == torch.float32 else MAX_ROWS if p.capability[0] == 9 and not gaps(p) else 32
    elif is_chunk(p):
        return tile_rows(p)
    return min(block_of(rows(p)), most)


def block_of(size: int) -> int:
    """Rows or columns of a tile that holds as many."""
    return max(MIN_DOT, 1 << (size - 1).bit_length())
