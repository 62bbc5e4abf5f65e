"""Which rows and keys a program of the Hopper forward for wide heads works on.

A tile is 64 rows: `queries` neighbouring queries (a power of two) of 64 / queries heads of one group, head after head.
Blocks of 64 keys are counted from the last key that the tile sees downwards, in pairs: of each pair the first consumer
computes the scores of the first block, the second one those of the other. What lies before key 0 reads as 0 and is
masked. With SPLIT several programs share the pairs of a tile.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hopper.tiles import keys_of, queries_of
from .parts import KEYS, ROWS, Item


@gluon.jit
def total_items(shape):
    return shape.rows * shape.batch * shape.kv_heads * shape.splits * shape.blocks


@gluon.jit
def item(i, pid, programs, shape, cfg):
    """This program's i-th. Rounds run forwards and backwards in turns, the last queries first, which see the most keys
    under a causal mask. Tiles that read the same keys are neighbours."""
    t = i * programs + gl.where((i & 1) == 1, programs - 1 - pid, pid)
    t = gl.minimum(t, total_items(shape) - 1)  # a program more than there are items repeats the last one
    rest = t // shape.blocks
    block = t - rest * shape.blocks
    t = rest // shape.splits
    split = rest - t * shape.splits
    rest = t // shape.kv_heads
    kv_head = t - rest * shape.kv_heads
    t = rest // shape.batch
    b = rest - t * shape.batch
    query = (shape.rows - 1 - t) * shape.queries
    head = kv_head * shape.group + block * (ROWS // shape.queries)
    q_len = queries_of(b, shape, cfg)
    kv_len = keys_of(b, shape, cfg)
    position = query + kv_len - q_len
    end = kv_len
    begin = 0
    if cfg.BAND:
        end = gl.minimum(position + shape.queries + shape.right, kv_len)
        begin = gl.maximum(position - shape.left, 0)
    if cfg.Q_LENGTHS:
        end = gl.where(query < q_len, end, 0)
    pairs = gl.maximum((end - begin + 2 * KEYS - 1) // (2 * KEYS), 1)
    if cfg.SPLIT:
        share = pairs // shape.splits
        extra = pairs - share * shape.splits
        end -= (split * share + gl.minimum(split, extra)) * (2 * KEYS)
        # A split without keys computes those before the tile's first one, which no row sees.
        pairs = gl.maximum(share + gl.where(split < extra, 1, 0), 1)
    return Item(b, kv_head, head, query, split, position, end - KEYS, pairs)


@gluon.jit
def is_cut(start, at, shape, cfg):
    """Whether rows do not see all keys of the block that begins at `start`."""
    cut = start < 0
    if cfg.BAND:
        cut = cut | (start < at.position + shape.queries - 1 - shape.left)
        cut = cut | (start + KEYS - 1 > at.position + shape.right)
    return cut


@gluon.jit
def mask(s, start, at, shape, cfg):
    """s, the scores of the block that begins at `start`, with -inf where a row does not see a key."""
    cols = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, s.type.layout))
    if cfg.BAND:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
        positions = at.position + (rows & (shape.queries - 1))
        visible = cols[None, :] <= (positions + shape.right)[:, None]
        visible = visible & (cols[None, :] >= gl.maximum(positions - shape.left, 0)[:, None])
        s = gl.where(visible, s, float("-inf"))
    else:
        s = gl.where((cols >= 0)[None, :], s, float("-inf"))
    return s
