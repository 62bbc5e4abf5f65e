"""Which blocks of keys a tensor mask with a row for each query hides from a block of queries, and which it leaves as
they are: the kernel.

A block is hidden (no row sees a key of it), full (every row sees every key, and the mask adds nothing), or partial.
That a hidden block is visited, or a full one read, costs time alone; that a partial one counts as either is a wrong
result. So a block is hidden or full only after all of it has been read. That it is partial may follow from few entries.

Where rows of the mask begin at multiples of 16 bytes, it is read as whole numbers of 8 bytes, several entries at a
time, and compared bit by bit. What bands and lengths hide altogether is not read. A block that they cut is read entry
by entry, as are masks that are laid out otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import lengths_of, mask_tile, visible_keys, whole_pieces

_MASK = ["mask_sb", "mask_sh", "mask_si", "mask_sj"]
#: Never specialised.
INTEGERS = [*_MASK, "list_heads", "row_blocks", "q_len", "kv_len", "left", "right"]

PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
WORD = tl.constexpr(8)  # bytes
_AT_ONCE = tl.constexpr(32)  # rows of a block that is read entry by entry
_PART = tl.constexpr(8192)  # bytes of blocks that are read in words: 64 for each thread
_SAMPLES = tl.constexpr(8)  # words of a block that are looked at first

# -inf in every entry of a word, and all bits of every entry but its sign.
_HIDDEN_BF16 = tl.constexpr(0xFF80FF80FF80FF80 - (1 << 64))
_HIDDEN_FP16 = tl.constexpr(0xFC00FC00FC00FC00 - (1 << 64))
_HIDDEN_FP32 = tl.constexpr(0xFF800000FF800000 - (1 << 64))
_HIDDEN_FP64 = tl.constexpr(0xFFF0000000000000 - (1 << 64))
_SIZE_16 = tl.constexpr(0x7FFF7FFF7FFF7FFF)
_SIZE_32 = tl.constexpr(0x7FFFFFFF7FFFFFFF)
_SIZE_64 = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_LOW_BITS = tl.constexpr(0x7F7F7F7F7F7F7F7F)
_HIGH_BITS = tl.constexpr(0x8080808080808080 - (1 << 64))


@triton.jit
def seen_and_neutral(entries):
    """Of a mask's entries: whether each lets its key be seen, and whether it leaves the score as it is. What is no
    number counts as seen: what becomes of it is not decided here."""
    if entries.dtype == tl.int1:
        return entries, entries
    else:
        return (entries == float("-inf")) == 0, entries == 0.0


@triton.jit
def _words_of(dtype: tl.constexpr):
    """A word of entries that are -inf, and one that has the bits that entries of 0 or -0 have not."""
    if dtype == tl.bfloat16:
        return _HIDDEN_BF16, _SIZE_16
    elif dtype == tl.float16:
        return _HIDDEN_FP16, _SIZE_16
    elif dtype == tl.float32:
        return _HIDDEN_FP32, _SIZE_32
    else:
        tl.static_assert(dtype == tl.float64)
        return _HIDDEN_FP64, _SIZE_64


@triton.jit
def _rows_of(b, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, BLOCK_M: tl.constexpr):
    """Of the BLOCK_M rows from `start` on, those `[begin, end)` that band and lengths let see a key; the keys
    `[first, last)` that one of them sees, and those `[first_full, last_full)` that all of them see. Without such rows
    last is 0. As `visible_keys` says for each of them: both bounds of a row grow with it."""
    queries, keys = lengths_of(b, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len)
    shift = keys - queries
    begin = tl.maximum(start, -shift - right)
    end = tl.minimum(start + BLOCK_M, queries)
    first = tl.maximum(begin + shift - left, 0)
    last = tl.where((begin < end) & (keys > 0), tl.minimum(end + shift + right, keys), 0)
    first_full = tl.maximum(end - 1 + shift - left, 0)
    last_full = tl.minimum(begin + shift + right + 1, keys)
    return begin, end, first, last, first_full, last_full


@triton.jit
def _tile_of_words(words_ptr, i, n, wanted, mask_si, WORDS: tl.constexpr):
    """Words of the rows i of blocks n, `[rows, blocks, WORDS]`. mask_si: in units of 16 bytes."""
    at = (i.to(tl.int64) * mask_si * 2)[:, None] + (n.to(tl.int64) * WORDS)[None, :]
    at = at[:, :, None] + tl.arange(0, WORDS)[None, None, :]
    return tl.load(words_ptr + at, mask=wanted[None, :, None], other=0)


@triton.jit
def _least(x):
    """Of `[rows, blocks, words]`, for each block."""
    return tl.min(tl.min(x, 2), 0)


@triton.jit
def _bool_states(words_ptr, row, begin, end, n, wanted, mask_si, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
                 WORDS: tl.constexpr):  # fmt: skip
    """The states of blocks n of a bool mask: see `_additive_states`. Entries are bytes, of which any but 0 is true."""
    some = tl.zeros([ROWS, n.shape[0], WORDS], tl.int64)
    every = some - 1
    for part in tl.static_range(BLOCK_M // ROWS):
        i = tl.minimum(tl.maximum(row + part * ROWS + tl.arange(0, ROWS), begin), end - 1)
        x = _tile_of_words(words_ptr, i, n, wanted, mask_si, WORDS)
        some |= x
        every &= ((x & _LOW_BITS) + _LOW_BITS) | x  # the high bit of each byte that is not 0
    hidden = _least((some == 0).to(tl.int32)) > 0
    full = _least(((every & _HIGH_BITS) == _HIGH_BITS).to(tl.int32)) > 0
    return tl.where(hidden, 0, tl.where(full, FULL, PARTIAL))


@triton.jit
def _additive_states(words_ptr, row, begin, end, n, wanted, mask_si, dtype: tl.constexpr, BLOCK_M: tl.constexpr,
                     ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """The states of blocks n of an additive mask, of which the rows `[begin, end)` count, those of the BLOCK_M from
    `row` on that see a key. wanted: which of the blocks are; of the others anything may be said.

    A few words decide most blocks. One that has an entry that is seen is not hidden, and one that has an entry that
    adds something is not full; of what is left each block can be but one of the two.
    """
    hidden_word, size = _words_of(dtype)
    k = tl.arange(0, _SAMPLES)
    of = begin + (k // 2) * (end - 1 - begin) // (_SAMPLES // 2 - 1)
    at = (of.to(tl.int64) * mask_si * 2 + (k % 2) * (WORDS - 1))[None, :] + (n.to(tl.int64) * WORDS)[:, None]
    x = tl.load(words_ptr + at, mask=wanted[:, None], other=0)
    seen = tl.max((x != hidden_word).to(tl.int32), 1) > 0
    adds = tl.max(((x & size) != 0).to(tl.int32), 1) > 0
    unsure = wanted & ((seen & adds) == 0)
    # What is left of a word of the kind that the block may be is 0.
    flipped = tl.where(seen, 0, hidden_word)[None, :, None]
    kept = tl.where(seen, size, -1)[None, :, None]
    left = tl.zeros([ROWS, n.shape[0], WORDS], tl.int64)
    if tl.max(unsure.to(tl.int32), 0) > 0:
        for part in tl.static_range(BLOCK_M // ROWS):
            i = tl.minimum(tl.maximum(row + part * ROWS + tl.arange(0, ROWS), begin), end - 1)
            left |= (_tile_of_words(words_ptr, i, n, unsure, mask_si, WORDS) ^ flipped) & kept
    uniform = unsure & (_least((left == 0).to(tl.int32)) > 0)
    return tl.where(uniform, tl.where(seen, FULL, 0), PARTIAL)


@triton.jit
def _store_uncut(
    mask_ptr, states_ptr, row, begin, end, first, last, first_full, last_full, at, key_blocks, mask_si,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Stores the states of those of the blocks of keys from `at` on that band and lengths hide altogether or not at
    all. See `_rows_of`, `_additive_states`."""
    n = at + tl.arange(0, BLOCKS)
    start = n * BLOCK_N
    reached = (start < last) & (start + BLOCK_N > first)
    wanted = reached & (start >= first_full) & (start + BLOCK_N <= last_full)
    words_ptr = mask_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    dtype: tl.constexpr = mask_ptr.dtype.element_ty
    BYTES: tl.constexpr = BLOCK_N if dtype == tl.int1 else BLOCK_N * dtype.primitive_bitwidth // 8
    WORDS: tl.constexpr = BYTES // WORD
    MOST: tl.constexpr = _PART // (BLOCKS * BYTES)
    ROWS: tl.constexpr = MOST if MOST < BLOCK_M else BLOCK_M
    if dtype == tl.int1:
        states = _bool_states(words_ptr, row, begin, end, n, wanted, mask_si, BLOCK_M, ROWS, WORDS)
    else:
        states = _additive_states(words_ptr, row, begin, end, n, wanted, mask_si, dtype, BLOCK_M, ROWS, WORDS)
    tl.store(states_ptr + n, tl.where(wanted, states, 0), mask=(n < key_blocks) & (wanted | (reached == 0)))


@triton.jit
def _state(
    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si, mask_sj,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PIECE: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """The state of one block, entry by entry, some rows at a time, the last ones first, until it is known."""
    ROWS: tl.constexpr = _AT_ONCE if BLOCK_M > _AT_ONCE else BLOCK_M
    some = start * 0
    every = some + 1
    for part in range(BLOCK_M // ROWS):
        if (some == 0) | (every > 0):
            i = (block + 1) * BLOCK_M - (part + 1) * ROWS + tl.arange(0, ROWS)
            lo, hi = visible_keys(
                b, i, i < q_len, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right
            )
            j = start + tl.arange(0, BLOCK_N)
            there = (i < q_len)[:, None] & (j < whole_pieces(kv_len, PIECE))[None, :]
            seen, neutral = seen_and_neutral(mask_tile(mask_ptr, i, j, there, mask_si, mask_sj, UNIT, True, ADJACENT))
            bounded = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
            some = tl.maximum(some, tl.max(tl.max((seen & bounded).to(tl.int32), 1), 0))
            whole = (neutral & bounded) | (hi <= lo)[:, None]
            every = tl.minimum(every, tl.min(tl.min(whole.to(tl.int32), 1), 0))
    return tl.where(some == 0, 0, tl.where(every > 0, FULL, PARTIAL))


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
    UNIT: tl.constexpr,  # elements per unit of the mask's strides; 16 bytes with IN_WORDS
    PIECE: tl.constexpr,  # of keys that are loaded together: the mask has a whole number of them
    ADJACENT: tl.constexpr,  # neighbouring keys are neighbours in memory
    IN_WORDS: tl.constexpr,  # rows begin at multiples of 16 bytes, and keys are neighbours
    BLOCKS: tl.constexpr,  # of keys, for one program
    PDL: tl.constexpr,
):
    """Classifies some blocks of keys of one block of rows. Programs go along the rows, as the mask lies in memory."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    key_blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    pieces = (key_blocks + BLOCKS - 1) // BLOCKS
    program = tl.program_id(0) // pieces
    at = (tl.program_id(0) - program * pieces) * BLOCKS
    entry = program // row_blocks
    block = program - entry * row_blocks
    b = entry // list_heads
    row = block * BLOCK_M
    begin, end, first, last, first_full, last_full = _rows_of(
        b, row, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, BLOCK_M
    )
    mask_ptr += (b.to(tl.int64) * mask_sb + (entry - b * list_heads).to(tl.int64) * mask_sh) * UNIT
    states_ptr += program.to(tl.int64) * key_blocks
    if IN_WORDS:
        _store_uncut(
            mask_ptr, states_ptr, row, begin, end, first, last, first_full, last_full, at, key_blocks, mask_si,
            BLOCK_M, BLOCK_N, BLOCKS,
        )  # fmt: skip
    for n in range(at, tl.minimum(at + BLOCKS, key_blocks)):
        start = n * BLOCK_N
        reached = (start < last) & (start + BLOCK_N > first)
        if IN_WORDS:
            left_over = reached & ((start < first_full) | (start + BLOCK_N > last_full))
        else:
            left_over = start >= 0
        if left_over:
            state = n * 0
            if reached:
                state = _state(
                    mask_ptr, b, block, start, q_lengths_ptr, kv_lengths_ptr, q_len, kv_len, left, right, mask_si,
                    mask_sj, BLOCK_M, BLOCK_N, UNIT, PIECE, ADJACENT,
                )  # fmt: skip
            tl.store(states_ptr + n, state)
