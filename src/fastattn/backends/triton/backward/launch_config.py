"""How the passes of the backward are launched: block sizes, warps and stages, as data.

Everything here follows from shapes, dtypes and the GPU. Lengths count only where there are few programs: `variants`
names all that they may lead to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....call import Problem
from ....shape_cache import cached
from ..limits import usual_shared_memory
from ..tile_parts import parts

LISTED_KEYS = 1024  #: keys of a tensor mask with rows from which on its blocks are classified first
#: Programs that fill a GPU: where there are fewer, those of the pass over keys share the heads of a group, and those of
#: the pass over a mask share what they sum.
PROGRAMS = 256
FEW = 132  #: programs that leave a part of a GPU without one
MOST_PIECES = 1 << 22  #: bytes of sums that programs which share a mask's gradient may write
RANGE_FIELDS = 4  #: int32 of a range, see `ranges.range_kernel`
STAT_BLOCK = 64  #: rows whose statistics one program of `prepare_kernel` finds
KEY_LIST_HEADER = 2  #: numbers before the blocks of a list, see `ranges.key_list_kernel`
MOST_SUMS = 1 << 26  #: bytes of sums that programs which share a group may write: dK and dV in float32, each


@dataclass(frozen=True, slots=True)
class Tile:
    """How one pass is launched."""

    block_m: int  #: queries
    block_n: int  #: keys
    warps: int
    stages: int  #: steps being loaded or computed


@dataclass(frozen=True, slots=True)
class Launch:
    """How all of them are."""

    keys: Tile
    queries: Tile
    bias: Tile
    exact: str = "bf16x6"  #: how products of float32 are computed: in Triton's words, as exact as float32 is


_LEAST = Tile(16, 16, 4, 1)

#: For 2-byte elements, by the larger of head and value dim, padded.
_HALF = {
    64: Launch(Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    128: Launch(Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    256: Launch(Tile(32, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    512: Launch(Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
}
#: The same for 2-byte elements where the passes have fewer programs than `FEW`.
_SMALL = Launch(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
_SMALL_DIM = 128
#: With a tensor mask that has a row for each query: the passes over keys and over queries have the same blocks, so that
#: they are classified once.
_HALF_MASKED = {
    64: Launch(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Launch(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Launch(Tile(32, 64, 8, 1), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
    512: Launch(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
}
#: For float32. Tiles of 64 rows, or of 128 for 8 warps, are multiplied by asynchronous instructions on SM 9.0.
_FLOAT = {
    64: Launch(Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    128: Launch(Tile(32, 128, 8, 1), Tile(128, 32, 8, 1), Tile(64, 32, 4, 1)),
    256: Launch(Tile(16, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    512: Launch(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
_FLOAT_MASKED = _FLOAT | {
    64: Launch(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
    128: Launch(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
}
#: Columns of a part of a head dim of float32, at least, and of the smallest dim, which is whole (see `head_parts`).
_LEAST_PART, _LEAST_DIM = 64, 16
#: Of a log-sum-exp, by the bytes of an element: beyond it float32 rounds it by more than results are rounded.
_COARSE = {2: 8192.0, 4: 256.0}
_SPARE = 16 << 10  #: bytes of shared memory in which the compiler changes layouts
_FLOAT_SPARE = 8 << 10  #: with products of float32, which have room for that anyway


@cached(1 << 12, "launches of the portable backward")
def choose(problem: Problem) -> Launch:
    """The launch for a problem: the one that is listed for its head dims, made smaller until it fits the GPU."""
    return _choose(problem, *_few(problem))


def variants(problem: Problem) -> list[tuple[Launch, int]]:
    """The launches and `group_parts` for problems like this one of any lengths, its own first."""
    p, own = problem, choose(problem)
    found = [(own, group_parts(p, own))]
    for few in (False, True) if _has_small(p) else (False,):
        launch = _choose(p, few, few)
        found += [(launch, p.group)] if few else [(launch, 1), (launch, p.group)]
    return list(dict.fromkeys(found))


def _choose(p: Problem, few_keys: bool, few_queries: bool) -> Launch:
    """few_keys, few_queries: whether the passes have few programs."""
    tables = (_HALF, _HALF_MASKED) if p.dtype.itemsize == 2 else (_FLOAT, _FLOAT_MASKED)
    table = tables[p.masked_rows]
    size = max(p.head_dim, p.value_dim)
    found = next((launch for dim, launch in table.items() if size <= dim), table[512])
    limit = usual_shared_memory(p.capability)

    def fitting(x: Tile) -> Tile:
        while shared(p, x) > limit:
            x = _smaller(x)
        return x

    keys = fitting(_SMALL.keys if few_keys else found.keys)
    queries = _SMALL.queries if few_queries else found.queries
    if p.masked_rows:
        queries = replace(queries, block_m=keys.block_m, block_n=keys.block_n)
    return replace(found, keys=keys, queries=fitting(queries), bias=fitting(found.bias))


def _has_small(p: Problem) -> bool:
    return p.dtype.itemsize == 2 and not p.masked_rows and max(p.head_dim, p.value_dim) <= _SMALL_DIM


def _few(p: Problem) -> tuple[bool, bool]:
    """Whether the passes over keys and over queries have few programs with the tiles that are listed."""
    if not _has_small(p):
        return False, False
    listed = _choose(p, False, False)
    keys, queries = -(-p.kv_len // listed.keys.block_n), -(-p.q_len // listed.queries.block_m)
    return keys * p.batch * p.q_heads < FEW, queries * p.batch * p.q_heads < FEW


def fits(problem: Problem) -> bool:
    """Whether the smallest launch has room in the GPU's shared memory."""
    return shared(problem, _LEAST) <= usual_shared_memory(problem.capability)


def shared(problem: Problem, x: Tile) -> int:
    """Bytes of shared memory that a pass takes at most: the tile that a program keeps, those of each stage, a tile of a
    mask, and what the compiler needs to transpose tiles and to change their layouts."""
    p = problem
    head, value = map(sum, head_parts(p))
    larger, smaller = max(x.block_m, x.block_n), min(x.block_m, x.block_n)
    mask = 0
    if p.dense_mask and p.mask_dtype is not None:
        mask = x.stages * x.block_m * x.block_n * p.mask_dtype.itemsize
    if p.dtype.itemsize == 2:
        rows = (larger + x.stages * smaller) * (head + value)
        return 2 * rows + x.block_m * x.block_n * 4 + mask + _SPARE
    # Products want tiles in three parts of 2 bytes, or transposed (found by compiling).
    dim = max(head, value)
    copies = max(4 * larger * dim + 6 * smaller * dim, 8 * smaller * (head + value))
    return 4 * (larger + (x.stages - 1) * smaller) * (head + value) + copies + mask + _FLOAT_SPARE


def _smaller(x: Tile) -> Tile:
    """The next smaller one."""
    if x.stages > 1:
        return replace(x, stages=x.stages - 1)
    assert max(x.block_m, x.block_n) > 16  # `fits` refuses what the smallest does not take
    larger = "block_n" if x.block_n >= x.block_m else "block_m"
    return replace(x, **{larger: getattr(x, larger) // 2})


def listed(problem: Problem) -> bool:
    """Whether the blocks that a tensor mask with rows hides are found before the passes."""
    p = problem
    return p.masked_rows and p.mask_shape[3] > 1 and p.kv_len >= LISTED_KEYS


def bounded(problem: Problem) -> bool:
    """Whether not a tensor mask alone says which keys a row sees."""
    p = problem
    return not p.dense_mask or p.banded or p.q_lengths or p.kv_lengths


def coarse(problem: Problem) -> float:
    """How large a log-sum-exp may be, either way, before `coarse_kernel` takes it apart."""
    return _COARSE[problem.dtype.itemsize]


def head_parts(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """`tile_parts.parts` of the head dim and of the value dim, with float32 none of less than 64 columns: with smaller
    ones Triton's six products of bf16 in place of one of float32 are wrong, where tiles are multiplied by asynchronous
    instructions (Triton 3.6, H200: an "illegal memory access" with a second part of 32, wrong gradients with one of 16
    under a mask; dims up to 16, which are one part, are right)."""

    def of(dim: int) -> tuple[int, int]:
        if problem.dtype.itemsize == 2 or dim <= _LEAST_DIM:
            return parts(dim)
        return parts(max(dim, _LEAST_PART), _LEAST_PART)

    return of(problem.head_dim), of(problem.value_dim)


def by_head(problem: Problem) -> bool:
    """Whether programs go from head to head, as in the forward."""
    p = problem
    return not (p.banded or p.masked_rows or p.mask == "intervals")


def group_parts(problem: Problem, launch: Launch) -> int:
    """Programs that share the heads of a group in the pass over keys."""
    p = problem
    programs = -(-p.kv_len // launch.keys.block_n) * p.batch * p.kv_heads
    size = 4 * p.batch * p.kv_len * p.kv_heads * (p.head_dim + p.value_dim)
    count = 1
    for n in range(2, p.group + 1):
        if p.group % n == 0 and programs * count < PROGRAMS and n * size <= MOST_SUMS:
            count = n
    return count
