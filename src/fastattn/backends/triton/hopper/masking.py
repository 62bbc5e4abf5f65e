"""What hides keys in the Hopper forward, inside the blocks that a tile visits."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ...._compat.gluon import barrier
from .parts import ALIGNED, BAND, BOOL, FULL, INTERVALS, NO_TILES, ROWS, SEGMENTS, Seen
from .tiles import block_start, read_list, read_part, row_bounds, tile_fields
from .turns import here, next_slot

_WIDE = gl.constexpr(64)  # values of a key that `drop_unseen` takes at a time
_LOWEST = gl.constexpr(-1e38)  # exponent that a finite bias leads to
_AT_ONCE = gl.constexpr(4)  # rows whose bounds it loads together


@gluon.jit
def look(m, b, h, group: gl.constexpr, layout: gl.constexpr, shape, cfg):
    """What a consumer has to know of its tile besides `span`: with LISTED `Listed`, with INTERVALS `Seen`, with
    SEGMENTS `Part`, else 0. layout: of the rows."""
    if cfg.LISTED:
        return read_list(m, b, h, shape, cfg)
    elif cfg.MASK == INTERVALS:
        return _read_bounds(m, b, h, group, layout, shape, cfg)
    elif cfg.MASK == SEGMENTS:
        return read_part(m, shape)
    else:
        return 0


@gluon.jit
def _read_bounds(m, b, h, group: gl.constexpr, layout: gl.constexpr, shape, cfg):
    """What the rows of a consumer's tile see."""
    at = shape.bounds + tile_fields(m, b, shape)
    lo_at, hi_at = row_bounds(m, b, shape, cfg)
    rows = group * ROWS + gl.arange(0, ROWS, layout=layout)
    lo = gl.load(shape.bounds + lo_at + rows)
    hi = gl.load(shape.bounds + hi_at + rows)
    biased = 0
    bias = 0
    if cfg.KEYS:
        biased = gl.load(at + 5)
        bias = shape.bias + (b.to(gl.int64) * shape.bias_b + h.to(gl.int64) * shape.bias_h)
    return Seen(lo, hi, gl.load(at + 2), gl.load(at + 3), gl.load(at + 4), biased, bias)


@gluon.jit
def masked_blocks(anchor, first, n, seen, group: gl.constexpr, shape, cfg):
    """Two numbers of blocks, cut and edge: blocks from `cut` on may hold keys before the first that all rows see,
    blocks before `edge` keys past the last."""
    cut = n
    edge = 0
    if cfg.MASK == INTERVALS:
        cut = gl.maximum(first + cfg.BLOCK_N - seen.highest, 0) // cfg.BLOCK_N
        edge = (gl.maximum(first + cfg.BLOCK_N - seen.lowest, 0) + cfg.BLOCK_N - 1) // cfg.BLOCK_N
    if cfg.MASK == SEGMENTS:
        position = seen.position + group * ROWS  # of the consumer's first row
        highest = gl.maximum(position + (ROWS - 1) - shape.left, anchor)
        cut = gl.maximum(first + cfg.BLOCK_N - highest, 0) // cfg.BLOCK_N
        if cfg.BLOCK_N < cfg.BLOCK_M:  # else only the first block ends behind what a row of the tile sees
            top = position + shape.right
            edge = (gl.maximum(first + cfg.BLOCK_N - 1 - top, 0) + cfg.BLOCK_N - 1) // cfg.BLOCK_N
    if cfg.MASK == BAND:
        bottom = gl.maximum(anchor + (group * ROWS + ROWS - 1) - shape.left, 0)
        cut = gl.maximum(first + cfg.BLOCK_N - bottom, 0) // cfg.BLOCK_N
    if cfg.BLOCK_N < cfg.BLOCK_M or cfg.TILES != NO_TILES:  # a block that begins at a multiple may end too late
        if cfg.MASK == BAND:
            top = anchor + group * ROWS + shape.right
            edge = (gl.maximum(first + cfg.BLOCK_N - 1 - top, 0) + cfg.BLOCK_N - 1) // cfg.BLOCK_N
        elif cfg.MASK == ALIGNED:
            edge = (cfg.BLOCK_M - group * ROWS + cfg.BLOCK_N - 1) // cfg.BLOCK_N
    return cut, edge


@gluon.jit
def mask(s, anchor, first, j, seen, group: gl.constexpr, shape, cfg):
    """s, the scores of block j (with LISTED, of the block of that index), with -inf where a row does not see a key.
    anchor, first: see `span`."""
    if cfg.LISTED:
        start = j * cfg.BLOCK_N
    else:
        start = block_start(anchor, first, j, cfg)
    cols = gl.arange(0, cfg.BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
    if cfg.TILES != NO_TILES:
        s = gl.where((cols < shape.kv_len - start)[None, :], s, float("-inf"))
    if cfg.MASK == FULL:
        if cfg.TILES == NO_TILES:
            s = gl.where((cols >= 0 - start)[None, :], s, float("-inf"))
    elif cfg.MASK == INTERVALS:
        # The last block may begin late, at the tile's first key: then its end repeats the block before.
        end = first - (j - 1) * cfg.BLOCK_N - start
        visible = (cols[None, :] >= (seen.lo - start)[:, None]) & (
            cols[None, :] < gl.minimum(seen.hi - start, end)[:, None]
        )
        s = gl.where(visible, s, float("-inf"))
    elif cfg.MASK == SEGMENTS:
        end = first - (j - 1) * cfg.BLOCK_N - start  # see above
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout)) + (seen.position + group * ROWS - start)
        s = gl.where(cols[None, :] < gl.minimum(rows + shape.right + 1, end)[:, None], s, float("-inf"))
        last = seen.position + (group * ROWS + ROWS - 1)
        if gl.maximum(last - shape.left, anchor) > start:  # most blocks under the diagonal end here
            s = gl.where(cols[None, :] >= gl.maximum(rows - shape.left, anchor - start)[:, None], s, float("-inf"))
    else:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout)) + (anchor + group * ROWS - start)
        if cfg.MASK == BAND:
            visible = cols[None, :] <= (rows + shape.right)[:, None]
            visible = visible & (cols[None, :] >= gl.maximum(rows - shape.left, 0 - start)[:, None])
        else:
            visible = cols[None, :] <= rows[:, None]
        s = gl.where(visible, s, float("-inf"))
    return s


@gluon.jit
def is_cut(index, anchor, first, group: gl.constexpr, shape, cfg):
    """Whether `mask` hides anything of the block of that index. Only with LISTED."""
    start = index * cfg.BLOCK_N
    cut = start > first
    if cfg.MASK == BAND:
        position = anchor + group * ROWS  # of the consumer's first row
        cut = cut | (start + cfg.BLOCK_N - 1 > position + shape.right) | (start < position + ROWS - 1 - shape.left)
    return cut


@gluon.jit
def with_tile(s, scale, pipe, slot, phase, group: gl.constexpr, cfg):
    """The scores under a tile of a tensor mask, whose place in shared memory is given back. Only with TILES.

    An additive mask's are scaled here, without log2(e): the sum of a score and a finite bias is finite.
    """
    mbarrier.wait(pipe.mask_full.index(slot), phase)
    tile = pipe.mask.index(slot * 2 + group).reshape([ROWS, cfg.BLOCK_N]).load(s.type.layout)
    if cfg.TILES == BOOL:
        s = gl.where(tile != 0, s, float("-inf"))
    else:
        s = s * scale + tile.to(gl.float32)
    barrier()  # all have read it
    mbarrier.arrive(pipe.mask_empty.index(slot))
    slot, phase = next_slot(slot, phase, cfg.MASK_STAGES)
    return s, slot, phase


@gluon.jit
def load_bias(anchor, first, j, scale, seen, cfg):
    """What block j's keys add to their scores, before these are scaled; a key in each thread. Only with KEYS."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    keys = block_start(anchor, first, j, cfg) + gl.arange(0, cfg.BLOCK_N, layout=layout)
    bias = gl.zeros([cfg.BLOCK_N], gl.float32, layout)
    if seen.biased != 0:
        bias = gl.load(seen.bias + keys)  # before key 0 there is memory too: what is there is masked
        # Neither this nor the exponent becomes -inf where the mask is finite.
        least = _LOWEST / gl.maximum(scale, 1.0)
        low = (bias / scale < least) & (bias != float("-inf"))
        bias = gl.where(low, least, bias / scale)
    return bias


@gluon.jit
def share_bias(bias, pipe, seen, group: gl.constexpr):
    """Puts it where all threads of the consumer find it."""
    if seen.biased != 0:
        barrier()  # the last block's has been read
        pipe.bias.index(group).store(bias)
        barrier()


@gluon.jit
def with_bias(s, pipe, seen, group: gl.constexpr):
    """The scores with what was put there added."""
    if seen.biased != 0:
        s += pipe.bias.index(group).load(gl.SliceLayout(0, s.type.layout))[None, :]
    return s


@gluon.jit
def drop_unseen(v, start, anchor, gaps, m, b, shape, cfg):
    """Writes 0 to the values of the keys of a block that no row of the tile sees. Only with INTERVALS.

    Such a key may hold anything, NaN too, which a probability of 0 does not make 0 in the product. Both consumers do
    it, each before its own product, and write the same.

    v: [BLOCK_N, DV] in shared memory. start: the block's first key. anchor: the first key that the tile sees; keys past
    the last are not in a block. gaps: not 0 where rows do not see all keys in between.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b = here(b)
    start = here(start)
    keys = start + gl.arange(0, cfg.BLOCK_N, layout=gl.SliceLayout(1, layout))
    visible = keys >= anchor
    if gaps != 0:
        visible = keys < start  # none yet
        lo_at, hi_at = row_bounds(m, b, shape, cfg)
        for row in range(0, cfg.BLOCK_M, _AT_ONCE):
            for i in gl.static_range(_AT_ONCE):
                lo = gl.load(shape.bounds + lo_at + row + i)
                hi = gl.load(shape.bounds + hi_at + row + i)
                visible = visible | ((keys >= lo) & (keys < hi))
    for column in gl.static_range(0, cfg.DV, _WIDE):
        part = v.slice(column, _WIDE, dim=1)
        x = part.load(layout)
        part.store(gl.where(visible[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    barrier()
