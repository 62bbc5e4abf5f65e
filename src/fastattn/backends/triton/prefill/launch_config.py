"""How the kernel for many queries is launched: block sizes, warps and stages, as data.

Everything here follows from shapes, dtypes and the GPU, never from lengths: one launch is good for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....call import Problem
from ....shape_cache import cached
from ..limits import usual_shared_memory
from ..tile_parts import parts

MOST_ROWS = 1 << 30  #: programs of one launch are counted in 31 bits
#: Rows of a mask from which on its blocks are classified first. A bias of fewer keys hides no block that would pay for
#: the two launches more.
LISTED_KEYS = 1024
LIST_HEADER = 3  #: numbers before the blocks of a list: see `block_lists.py`
LISTED_BLOCKS = 4  #: the same for masks of one row, whose lists one small launch makes

#: Batch entries from which on programs may walk over them, and the largest head dim with which they do.
BATCH, BATCH_DIM = 16, 64


@dataclass(frozen=True, slots=True)
class Launch:
    """One way of launching the kernel."""

    block_m: int  #: queries
    block_n: int  #: keys per step
    warps: int
    stages: int  #: steps being loaded or computed


_LEAST = Launch(16, 16, 4, 1)

#: For 2-byte elements, by the larger of head and value dim, padded. Measured on SM 9.0.
_HALF = {
    64: Launch(64, 64, 4, 3),
    128: Launch(64, 64, 4, 3),
    256: Launch(64, 64, 8, 2),
    512: Launch(64, 32, 8, 2),
}
#: For 2-byte elements and a mask with a row for each query, whose tiles need room beside the keys' and values'.
_HALF_MASKED = _HALF | {128: Launch(64, 64, 4, 2)}
#: For float32. Of 32 queries: three TF32 products by asynchronous instructions of 64 rows take half as long again.
_FLOAT = {
    64: Launch(64, 64, 4, 2),
    128: Launch(32, 64, 4, 2),
    256: Launch(32, 32, 8, 2),
    512: Launch(32, 16, 8, 2),
}
_SPARE = 8 << 10  #: bytes of shared memory in which the compiler changes layouts


@cached(1 << 12, "launches of the prefill kernel")
def choose(problem: Problem) -> Launch:
    """The launch for a problem: the one that is listed for its head dims, made smaller until it fits the GPU."""
    p = problem
    table = _FLOAT if p.dtype.itemsize != 2 else _HALF_MASKED if p.masked_rows else _HALF
    size = max(p.head_dim, p.value_dim)
    found = next((launch for dim, launch in table.items() if size <= dim), table[512])
    limit = usual_shared_memory(p.capability)
    while shared(p, found) > limit:
        found = _smaller(found)
    return found


def fits(problem: Problem) -> bool:
    """Whether the smallest launch has room in the GPU's shared memory. Some float32 calls have none on small GPUs."""
    return shared(problem, _LEAST) <= usual_shared_memory(problem.capability)


def shared(problem: Problem, launch: Launch) -> int:
    """Bytes of shared memory that a launch takes at most: q, K and V of each stage, a tile of a mask, and what the
    compiler needs to transpose tiles and to change their layouts (found by compiling; `test_launches.py` does)."""
    p, x = problem, launch
    head, value = sum(parts(p.head_dim)), sum(parts(p.value_dim))
    rows = x.block_m * head + x.stages * x.block_n * (head + value)
    if p.dtype.itemsize == 4 and x.block_m > 16:
        if x.block_m >= 64:  # asynchronous instructions want K and V transposed
            rows += x.block_n * (head + value)
        elif x.stages == 1:
            rows += x.block_n * max(head, value)
    mask = x.block_m * x.block_n * p.mask_dtype.itemsize if p.masked_rows and p.mask_dtype else 0
    return p.dtype.itemsize * rows + mask + (_SPARE if x.block_m > 16 else _SPARE // 4)


def _smaller(x: Launch) -> Launch:
    """The next smaller launch."""
    if x.stages > 2:
        return Launch(x.block_m, x.block_n, x.warps, 2)
    if x.block_n > 32:
        return Launch(x.block_m, x.block_n // 2, x.warps, x.stages)
    if x.block_m > 32:
        return Launch(x.block_m // 2, x.block_n, x.warps, x.stages)
    if x.block_n > 16:
        return Launch(x.block_m, x.block_n // 2, x.warps, x.stages)
    if x.stages > 1:
        return Launch(x.block_m, x.block_n, x.warps, 1)
    return Launch(x.block_m // 2, x.block_n, x.warps, x.stages)


def listed(problem: Problem, launch: Launch) -> bool:
    """Whether blocks of keys that a tensor mask hides are found before the kernel runs."""
    p = problem
    if not p.dense_mask or p.mask_shape[3] == 1:
        return False
    if p.mask_shape[2] == 1:
        return p.kv_len > LISTED_BLOCKS * launch.block_n
    return p.kv_len >= LISTED_KEYS


def walks_batch(problem: Problem, launch: Launch) -> bool:
    """Whether one tile of a mask is all that a block of queries has, and many batch entries share it: see
    `batch_kernel.py`. What that kernel lacks, few such calls have."""
    p = problem
    if not p.masked_rows or p.mask_shape[3] == 1 or p.kv_len > launch.block_n or p.batch < BATCH:
        return False
    if p.dtype.itemsize != 2 or p.sinks or p.softcap or p.q_lengths or p.kv_lengths:
        return False
    return all(dim <= BATCH_DIM and not parts(dim)[1] for dim in (p.head_dim, p.value_dim))


def walking_options(problem: Problem) -> dict[str, int]:
    """What else such a kernel is compiled with. With head dims up to 32 four programs fit a multiprocessor of Hopper's
    if a thread has 128 registers. Triton 3.6 gives it 167 otherwise, of which it then keeps six elsewhere."""
    return {"maxnreg": 128} if max(problem.head_dim, problem.value_dim) <= 32 else {}


def by_head(problem: Problem) -> bool:
    """Whether programs go from head to head, which keeps keys and values in the L2 cache. Not where blocks of rows may
    have different amounts to do: then those of all heads that probably have most go first."""
    p = problem
    return not (p.banded or p.masked_rows)
