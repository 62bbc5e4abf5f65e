"""Which tile a program of the Hopper forward works on, and which keys that tile sees.

A tile is BLOCK_M query rows of one head. Programs are persistent: each takes tiles in an order that all its warp groups
find by themselves, from the same numbers. Under a band the longest tiles come first.

Blocks of keys are counted from the last key that the tile sees, not from key 0. So no block reaches past that key: what
lies between a row's length and the capacity is never loaded, and cannot be NaN in a product with a probability of 0.
The other end of the row may cut a block, whose first keys then have negative indices: the copy engine fills
them with 0.

With bounds of each row (INTERVALS) what lies before a tile's first key is as unknown as what lies past its last. There
the last block begins at the first key, and repeats keys of the block before it, which it masks. Only a tile of fewer
keys than a block has is left with others in it: see `masking.drop_unseen`. So it is with SEGMENTS, where a tile has a
part of one segment's rows, and its own first row.

Under a mask with a row for each query a block begins at a multiple of ALIGNED_KEYS: the copy engine reads no tile of a
mask from another key on. Such a block may reach past the last key, where keys, values and mask read as 0: the entry has
as many keys as the tensors there, `KV_LENGTHS` is never beside such a mask.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..bounds_kernel import FIELDS, HEADER
from ..prefill.block_lists import HEADER as LIST_HEADER
from .parts import BAND, FULL, INTERVALS, NO_TILES, SEGMENTS, Listed, Part
from .segments_kernel import FIELDS as TILE_FIELDS
from .segments_kernel import HEADER as TILE_HEADER

ALIGNED_KEYS = gl.constexpr(16)  # bytes, which the copy engine wants: as many keys, of the smallest elements


@gluon.jit
def _popcount(bits):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def queries_of(b, shape, cfg):
    """Queries of batch entry b."""
    n = shape.q_len
    if cfg.Q_LENGTHS:
        n = gl.minimum(gl.maximum(gl.load(shape.q_lengths + b), 0), n)
    return n


@gluon.jit
def keys_of(b, shape, cfg):
    """Keys of batch entry b."""
    n = shape.kv_len
    if cfg.KV_LENGTHS:
        n = gl.minimum(gl.maximum(gl.load(shape.kv_lengths + b), 0), n)
    return n


@gluon.jit
def span(m, b, h, shape, cfg):
    """The keys of row block m of batch entry b, head h.

    Returns an anchor, the first key of the first block, and how many blocks there are: at least one, so that a tile
    without keys is no special case. Blocks go upwards without a band or a mask with rows, else downwards. The anchor is
    the position of the first query, or with INTERVALS and SEGMENTS the first key that the tile sees. With LISTED the
    order is the list's, and the first key is that of a block that ends with the last key.
    """
    if cfg.LISTED:
        return _span_of_list(m, b, h, shape, cfg)
    elif cfg.MASK == INTERVALS:
        return _span_of_bounds(m, b, shape, cfg)
    elif cfg.MASK == SEGMENTS:
        at = record(m, shape)
        return _blocks_between(gl.load(at + 4), gl.load(at + 5), cfg)
    else:
        return _span_of_band(m, b, shape, cfg)


@gluon.jit
def _span_of_bounds(m, b, shape, cfg):
    at = shape.bounds + tile_fields(m, b, shape)
    return _blocks_between(gl.load(at), gl.load(at + 1), cfg)


@gluon.jit
def _blocks_between(begin, end, cfg):
    n = gl.maximum((end - begin + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
    return begin, end - cfg.BLOCK_N, n


@gluon.jit
def record(m, shape):
    """Where the numbers of tile m of all segments' are. Only with SEGMENTS."""
    return shape.bounds + TILE_HEADER + m * TILE_FIELDS


@gluon.jit
def read_part(m, shape):
    """The rows of tile m. Only with SEGMENTS."""
    at = record(m, shape)
    return Part(gl.load(at + 1), gl.load(at + 2), gl.load(at + 3))


@gluon.jit
def first_row(m, seen, cfg):
    """The first query row of a tile."""
    row = m * cfg.BLOCK_M
    if cfg.MASK == SEGMENTS:
        row = seen.row
    return row


@gluon.jit
def end_row(b, seen, shape, cfg):
    """One past the last row that is to be computed: of a tile, with SEGMENTS; else of batch entry b."""
    if cfg.MASK == SEGMENTS:
        return seen.row + seen.rows
    else:
        return queries_of(b, shape, cfg)


@gluon.jit
def stored_rows(queries, shape, cfg):
    """One past the last row that may be written. queries: `end_row`. (With lengths, rows past them get their zeros.)"""
    if cfg.MASK == SEGMENTS:
        return queries
    else:
        return shape.q_len


@gluon.jit
def _list_of(m, b, h, shape):
    """Where the list of a tile is: see `block_lists.py`."""
    return shape.bounds + (
        b.to(gl.int64) * shape.list_b + h.to(gl.int64) * shape.list_h + m.to(gl.int64) * shape.list_m
    )


@gluon.jit
def _span_of_list(m, b, h, shape, cfg):
    at = _list_of(m, b, h, shape)
    n = gl.maximum(gl.load(at + 1) + gl.load(at + 2), 1)
    return m * cfg.BLOCK_M + shape.kv_len - queries_of(b, shape, cfg), shape.kv_len - cfg.BLOCK_N, n


@gluon.jit
def read_list(m, b, h, shape, cfg):
    """Which blocks the tile visits. Only with LISTED.

    The first block takes a tile of the mask even where it need not: it is one of the run's then, or hidden, where the
    tile sees no key.
    """
    at = _list_of(m, b, h, shape)
    run = gl.load(at)
    listed = gl.load(at + 2)
    others = gl.maximum(listed, 1)
    # Without a list the run's first block is block 0, which the pointer is made to say.
    at += gl.where(listed > 0, LIST_HEADER, 0)
    return Listed(at, others, run - listed, gl.load(at))


@gluon.jit
def listed_index(listed, j):
    """The index of block j of a tile's list."""
    index = j + listed.run
    if j < listed.others:
        index = gl.load(listed.at + j)
    return index


@gluon.jit
def tile_fields(m, b, shape):
    """Where the bounds of a tile are."""
    return HEADER + (b * shape.rows + m) * FIELDS


@gluon.jit
def row_bounds(m, b, shape, cfg):
    """Where the tile's first lo is, and its first hi."""
    tiles = shape.batch * shape.rows
    lo = HEADER + tiles * FIELDS + (b * shape.rows + m) * cfg.BLOCK_M
    return lo, lo + tiles * cfg.BLOCK_M


@gluon.jit
def in_order(rank, shape, cfg):
    """The tile, and its batch entry, of which `rank` others of a head see more keys. Only with INTERVALS."""
    tiles = shape.batch * shape.rows
    at = gl.load(shape.bounds + HEADER + tiles * (FIELDS + 2 * cfg.BLOCK_M) + rank)
    b = at // shape.rows
    return at - b * shape.rows, b


@gluon.jit
def _span_of_band(m, b, shape, cfg):
    kv_len = keys_of(b, shape, cfg)
    position = m * cfg.BLOCK_M + kv_len - queries_of(b, shape, cfg)
    if cfg.MASK == FULL:
        n = gl.maximum((kv_len + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
        first = kv_len - n * cfg.BLOCK_N
        if cfg.TILES != NO_TILES:
            first = (n - 1) * cfg.BLOCK_N
    else:
        end = position + cfg.BLOCK_M
        begin = 0
        if cfg.MASK == BAND:
            end = gl.minimum(end + shape.right, kv_len)
            begin = gl.maximum(position - shape.left, 0)
        if cfg.TILES != NO_TILES:
            end = (end + ALIGNED_KEYS - 1) // ALIGNED_KEYS * ALIGNED_KEYS
        n = gl.maximum((end - begin + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
        first = end - cfg.BLOCK_N
    return position, first, n


@gluon.jit
def block_start(anchor, first, j, cfg):
    """The first key of block j."""
    if cfg.MASK == FULL and cfg.TILES == NO_TILES:
        return first + j * cfg.BLOCK_N
    elif cfg.MASK == INTERVALS or cfg.MASK == SEGMENTS:
        return gl.maximum(first - j * cfg.BLOCK_N, gl.minimum(anchor, first))
    else:
        return first - j * cfg.BLOCK_N


@gluon.jit
def _longer(shape, start, least, WARPS: gl.constexpr):
    """Of the 32 batch entries from `start`, those with more than `least` queries, as bits."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    i = gl.arange(0, 32, layout=lanes)
    n = gl.load(shape.q_lengths + start + i, mask=start + i < shape.batch, other=0)
    return gl.sum(gl.where(n > least, (i * 0 + 1) << i, 0), 0)


@gluon.jit
def _count(shape, level, cfg, WARPS: gl.constexpr):
    """Batch entries that have queries in row block `level`."""
    found = 0
    for start in range(0, shape.batch, 32):
        found += _popcount(_longer(shape, start, level * cfg.BLOCK_M, WARPS))
    return found


@gluon.jit
def _pick(shape, level, which, cfg, WARPS: gl.constexpr):
    """The `which`-th of them."""
    b = 0
    for start in range(0, shape.batch, 32):
        bits = _longer(shape, start, level * cfg.BLOCK_M, WARPS)
        here = _popcount(bits)
        if (which >= 0) & (which < here):
            for _ in range(which):
                bits = bits & (bits - 1)
            b = start + _popcount((bits & (0 - bits)) - 1)
        which -= here
    return b


@gluon.jit
def total_tiles(shape, cfg, WARPS: gl.constexpr):
    """Tiles of the call; with lengths of queries those that have queries, with bounds or segments those that see
    keys."""
    if cfg.MASK == INTERVALS or cfg.MASK == SEGMENTS:
        return gl.load(shape.bounds) * shape.heads
    elif cfg.Q_LENGTHS:
        lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        i = gl.arange(0, 32, layout=lanes)
        found = 0
        for start in range(0, shape.batch, 32):
            n = gl.load(shape.q_lengths + start + i, mask=start + i < shape.batch, other=0)
            n = gl.minimum(gl.maximum(n, 0), shape.q_len)
            found += gl.sum((n + cfg.BLOCK_M - 1) // cfg.BLOCK_M, 0)
        return found * shape.heads
    else:
        return shape.rows * shape.batch * shape.heads


@gluon.jit
def share(total, pid, programs):
    """How many of the tiles are this program's. Rounds run forwards and backwards in turns, so that no program gets the
    longest of each. One at least: a program more than there are tiles repeats the last one, to the same bits."""
    rounds = total // programs
    rest = total - rounds * programs
    place = gl.where((rounds & 1) == 1, programs - 1 - pid, pid)
    return gl.maximum(rounds + gl.where(place < rest, 1, 0), 1)


@gluon.jit
def start_walk(shape, cfg, WARPS: gl.constexpr):
    """See `tile`: the row block that a program stands at, tiles of those before it, batch entries in it."""
    level = shape.rows - 1
    count = shape.batch
    if cfg.Q_LENGTHS:
        count = _count(shape, level, cfg, WARPS)
    return level, level * 0, count


@gluon.jit
def tile(i, total, pid, programs, level, before, count, shape, cfg, WARPS: gl.constexpr):
    """Row block (with SEGMENTS the tile's number), batch entry and head of this program's i-th tile; the walk (level,
    before, count) moved on to it."""
    t = i * programs + gl.where((i & 1) == 1, programs - 1 - pid, pid)
    if cfg.MASK == INTERVALS:
        t = gl.maximum(gl.minimum(t, total - 1), 0)
        rank = t // shape.heads
        h = t - rank * shape.heads
        m, b = in_order(rank, shape, cfg)
    elif cfg.MASK == SEGMENTS:
        t = gl.maximum(gl.minimum(t, total - 1), 0)
        m = t // shape.heads
        h = t - m * shape.heads
        b = gl.load(record(m, shape))
    elif cfg.Q_LENGTHS:
        # Row blocks from the last to the first; in each, the entries that reach it, and their heads.
        t = gl.maximum(gl.minimum(t, total - 1), 0)
        while (t >= before + count * shape.heads) & (level > 0):
            before += count * shape.heads
            level -= 1
            count = _count(shape, level, cfg, WARPS)
        which = (t - before) // shape.heads
        h = t - before - which * shape.heads
        b = gl.minimum(_pick(shape, level, which, cfg, WARPS), shape.batch - 1)
        m = level
    else:
        # Sections of heads; in each, row blocks, and heads side by side.
        per_section = shape.section * shape.rows
        section = t // per_section
        r = t - section * per_section
        here = gl.minimum(shape.section, shape.batch * shape.heads - section * shape.section)
        m = r // here
        bh = section * shape.section + r - m * here
        b = bh // shape.heads
        h = bh - b * shape.heads
        if cfg.MASK != FULL or cfg.LISTED:
            m = shape.rows - 1 - m
    return m, b, h, level, before, count
