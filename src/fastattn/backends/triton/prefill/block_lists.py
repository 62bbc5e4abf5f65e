"""Which blocks of keys a block of queries has to compute, under a tensor mask: the kernels.

The result is, for each block of rows, a list of int32:

    0  the first block of the run: side by side, of each of them every row sees every key, and the mask adds nothing
    1  how many blocks the run has
    2  how many more blocks are not hidden
    3  their indices

Most masks (causal, a prefix, a window, padding) leave one run and a few blocks at its ends. Hidden blocks are in no
list. Bands and lengths count, like the mask.

A mask that all queries share is read by the kernel that writes the lists. Another one is classified first, by many
programs, one byte a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import float_bias, mask_tile, visible_keys, whole_pieces
from ..walk import span_of
from .launch_config import LIST_HEADER

_MASK = ["mask_sb", "mask_sh", "mask_si", "mask_sj"]
#: Never specialised.
INTEGERS = [*_MASK, "list_heads", "row_blocks", "q_len", "kv_len", "left", "right"]

HEADER = tl.constexpr(LIST_HEADER)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
_AT_ONCE = tl.constexpr(32)  # rows of a block whose mask is loaded together


@triton.jit
def _seen_and_neutral(bias):
    """Of a mask's entries: whether each lets its key be seen, and whether it leaves the score as it is."""
    if bias.dtype == tl.int1:
        return bias, bias
    else:
        bias = float_bias(bias)
        return bias > float("-inf"), bias == 0.0


@triton.jit
def _keys_of(b, i, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right):
    """The keys that band and lengths let each of the rows i see."""
    return visible_keys(
        b, i, i < q_len, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right
    )  # fmt: skip


@triton.jit
def _entries(
    mask_ptr, b, i, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Of the rows i of a block of keys, for each entry: whether its key is seen, whether the mask leaves its score as
    it is, and whether band and lengths let it be seen; and of each row whether they let it see any key.

    What is loaded does not depend on band and lengths: neighbours come in one load.
    """
    lo, hi = _keys_of(b, i, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right)
    j = start + tl.arange(0, BLOCK_N)
    there = (i < q_len)[:, None] & (j < whole_pieces(kv_len, UNIT))[None, :]
    seen, neutral = _seen_and_neutral(mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, UNIT, True, ADJACENT))
    bounded = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    return seen & bounded, neutral, bounded, hi > lo


@triton.jit
def _may_be_uniform(
    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Whether a block may be hidden, or full, as far as its first and its last row tell. Most blocks of a bias are
    neither, and the rest of them need not be read."""
    i = block * BLOCK_M + tl.arange(0, 2) * (BLOCK_M - 1)
    seen, neutral, bounded, _ = _entries(
        mask_ptr, b, i, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj, BLOCK_N,
        UNIT, ADJACENT,
    )  # fmt: skip
    some = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
    every = tl.min(tl.min((neutral | (bounded == 0)).to(tl.int32), 1), 0) > 0
    return (some == 0) | every


@triton.jit
def _state(
    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """A block's state, from all of it.

    Some rows at a time, and one reduction at the end: so many loads are on their way, and few registers taken, that
    memory is what it waits for.
    """
    ROWS: tl.constexpr = _AT_ONCE if BLOCK_M > _AT_ONCE else BLOCK_M
    some = tl.zeros([ROWS, BLOCK_N], tl.int1)
    every = tl.full([ROWS, BLOCK_N], 1, tl.int1)
    for part in tl.static_range(BLOCK_M // ROWS):
        i = block * BLOCK_M + part * ROWS + tl.arange(0, ROWS)
        seen, neutral, bounded, sees = _entries(
            mask_ptr, b, i, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj,
            BLOCK_N, UNIT, ADJACENT,
        )  # fmt: skip
        some = some | seen
        every = every & ((neutral & bounded) | (sees == 0)[:, None])
    hidden = tl.max(tl.max(some.to(tl.int32), 1), 0) == 0
    full = tl.min(tl.min(every.to(tl.int32), 1), 0) > 0
    return tl.where(hidden, 0, tl.where(full, FULL, PARTIAL))


@triton.jit(do_not_specialize=INTEGERS)
def classify_kernel(
    mask_ptr,
    states_ptr,  # uint8 [list batch, list heads, row blocks, key blocks]: 0 hidden, 1 partial, 2 full
    q_lengths_ptr,
    kv_lengths_ptr,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    list_heads,
    row_blocks,
    q_len,
    kv_len,
    left,
    right,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    BLOCKS: tl.constexpr,  # of keys, for one program
):
    """Classifies some blocks of keys of one block of rows."""
    entry = tl.program_id(0) // row_blocks
    block = tl.program_id(0) - entry * row_blocks
    b = entry // list_heads
    key_blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    lo, hi = _keys_of(b, i, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right)
    _, first, last = span_of(lo, hi, kv_len)
    mask_ptr += (b.to(tl.int64) * mask_sb + (entry - b * list_heads).to(tl.int64) * mask_sh) * MASK_UNIT
    begin = tl.program_id(1) * BLOCKS
    for n in range(begin, tl.minimum(begin + BLOCKS, key_blocks)):
        start = n * BLOCK_N
        state = n * 0
        if (start < last) & (start + BLOCK_N > first):
            state += PARTIAL
            unsure = state > 0
            if mask_ptr.dtype.element_ty != tl.int1:
                unsure = _may_be_uniform(
                    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si,
                    mask_sj, BLOCK_M, BLOCK_N, MASK_UNIT, MASK_ADJACENT,
                )  # fmt: skip
            if unsure:
                state = _state(
                    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si,
                    mask_sj, BLOCK_M, BLOCK_N, MASK_UNIT, MASK_ADJACENT,
                )  # fmt: skip
        tl.store(states_ptr + tl.program_id(0).to(tl.int64) * key_blocks + n, state)


@triton.jit(do_not_specialize=INTEGERS)
def list_kernel(
    mask_ptr,
    states_ptr,  # of `classify_kernel`; None: the mask is the same for all queries
    lists_ptr,  # int32 [list batch, list heads, row blocks, HEADER + key blocks]
    q_lengths_ptr,
    kv_lengths_ptr,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    list_heads,
    row_blocks,
    q_len,
    kv_len,
    left,
    right,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    MASK_ADJACENT: tl.constexpr,
    BLOCKS: tl.constexpr,  # of keys, in one step
    SHARED: tl.constexpr,  # one list for all blocks of rows: nothing but the mask and the keys' lengths hides keys
):
    """Writes the list of one block of rows."""
    program = tl.program_id(0)
    entry = program // row_blocks
    b = entry // list_heads
    key_blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    lists_ptr += program.to(tl.int64) * (key_blocks + HEADER)
    if states_ptr is None:
        if SHARED:
            first = b * 0
            first_full = first
            last = kv_len + first
            if kv_lengths_ptr is not None:
                last = tl.minimum(tl.maximum(tl.load(kv_lengths_ptr + b), 0), kv_len)
            last_full = last
        else:
            block = program - entry * row_blocks
            i = block * BLOCK_M + tl.arange(0, BLOCK_M)
            lo, hi = _keys_of(b, i, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right)
            sees, first, last = span_of(lo, hi, kv_len)
            first_full = tl.max(tl.where(sees, lo, 0), 0)
            last_full = tl.min(tl.where(sees, hi, kv_len), 0)
        mask_ptr += (b.to(tl.int64) * mask_sb + (entry - b * list_heads).to(tl.int64) * mask_sh) * MASK_UNIT
    run = b * 0  # its first block, how many it has so far, and whether it has ended
    length = run
    ended = run
    others = run
    for begin in range(0, key_blocks, BLOCKS):
        n = begin + tl.arange(0, BLOCKS)
        if states_ptr is None:
            j = n[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            bounded = (j >= first) & (j < last)
            at = j.to(tl.int64) if MASK_ADJACENT else j.to(tl.int64) * mask_sj * MASK_UNIT
            seen, neutral = _seen_and_neutral(tl.load(mask_ptr + at, mask=bounded, other=0))
            some = tl.max((seen & bounded).to(tl.int32), 1) > 0
            all_neutral = tl.min((neutral & bounded & (j >= first_full) & (j < last_full)).to(tl.int32), 1) > 0
            is_full = some & all_neutral
            is_partial = some & (all_neutral == 0)
        else:
            state = tl.load(states_ptr + program.to(tl.int64) * key_blocks + n, mask=n < key_blocks, other=0)
            is_full = state == FULL
            is_partial = state == PARTIAL
        # The run goes on, or begins, at the first full block of this step, up to the next that is not.
        begins = tl.where(length > 0, begin, tl.min(tl.where(is_full, n, key_blocks), 0))
        stops = tl.min(tl.where((n >= begins) & (is_full == 0), n, begin + BLOCKS), 0)
        here = tl.where(ended > 0, 0, tl.maximum(stops - begins, 0))
        in_run = (n >= begins) & (n < begins + here)
        run = tl.where((length == 0) & (here > 0), begins, run)
        length += here
        ended = tl.where((length > 0) & (stops < begin + BLOCKS), 1, ended)
        listed = (is_full | is_partial) & (in_run == 0)
        tl.store(lists_ptr + (HEADER - 1) + others + tl.cumsum(listed.to(tl.int32), 0), n, mask=listed)
        others += tl.sum(listed.to(tl.int32), 0)
    tl.store(lists_ptr, run)
    tl.store(lists_ptr + 1, length)
    tl.store(lists_ptr + 2, others)
