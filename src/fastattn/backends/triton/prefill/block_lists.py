"""Which blocks of keys a block of queries has to compute, under a tensor mask: the kernels.

The result is, for each block of rows, a list of int32:

    0  the first block of the run: side by side, of each of them every row sees every key, and the mask adds nothing
    1  how many blocks the run has
    2  how many more blocks are not hidden
    3  their indices

Most masks (causal, a prefix, a window, padding) leave one run and a few blocks at its ends. Hidden blocks are in no
list. Bands and lengths count, like the mask.

A mask that all queries share is read by the kernel that writes the lists. Another one is classified first, by many
programs, one byte a block: see `block_states.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import visible_keys
from ..walk import span_of
from .block_states import FULL, INTEGERS, PARTIAL, seen_and_neutral
from .launch_config import LIST_HEADER

HEADER = tl.constexpr(LIST_HEADER)


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
    PDL: tl.constexpr,
):
    """Writes the list of one block of rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
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
            lo, hi = visible_keys(
                b, i, i < q_len, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right
            )
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
            seen, neutral = seen_and_neutral(tl.load(mask_ptr + at, mask=bounded, other=0))
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
