"""What hides keys from queries in the Hopper backward. Scores are transposed: a row is a key, a column a query."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..bounds_kernel import FIELDS, HEADER
from ..hopper.turns import here
from .parts import BAND, CAUSAL, HALF, INTERVALS, NARROW, ROWS
from .tiles import seen_at

_WIDE = gl.constexpr(64)  # columns that `drop_unseen` takes at a time


@gluon.jit
def common_range(m, b, shape, cfg):
    """The keys [least, end) that each query of a tile sees that sees any. Only with INTERVALS."""
    least = 0
    end = 0
    if cfg.MASK == INTERVALS:
        at = shape.bounds + HEADER + (b * shape.tiles + m) * FIELDS
        least = gl.load(at + 2)
        end = gl.load(at + 3)
    return least, end


@gluon.jit
def _seldom(rows, cfg):
    """The same, of which nothing is computed earlier. The compiler would keep what few steps need in registers all
    through the loop, and with wide heads there are none left."""
    if cfg.D > NARROW:
        return rows + here(0)
    else:
        return rows


@gluon.jit
def mask(s, m, row: gl.constexpr, b, key, least, end, shape, cfg):
    """s `[HALF, queries]` with -inf where a query does not see a key. m, row: the tile, and which of its queries is the
    first. key: the first one's. Queries that are not there, or see nothing, have a log-sum-exp of +inf and are no
    matter here."""
    QUERIES: gl.constexpr = s.shape[1]
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, s.type.layout))
    cols = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, s.type.layout))
    position = m * ROWS + row + (shape.kv_len - shape.q_len) - key  # of the first query, counted from the first key
    if cfg.MASK == CAUSAL:
        if position < HALF - 1:
            s = gl.where(_seldom(rows, cfg)[:, None] <= (cols + position)[None, :], s, float("-inf"))
    elif cfg.MASK == BAND:
        if (position + shape.right < HALF - 1) | (position + (QUERIES - 1) - shape.left > 0):
            inside = _seldom(rows, cfg)[:, None] - (cols + (position - shape.left))[None, :]
            s = gl.where((inside >= 0) & (inside <= shape.left + shape.right), s, float("-inf"))
        if key + HALF > shape.kv_len:
            s = gl.where((rows < shape.kv_len - key)[:, None], s, float("-inf"))
    elif cfg.MASK == INTERVALS:
        tile = b * shape.tiles + m
        at = HEADER + shape.batch * shape.tiles * FIELDS + tile * ROWS + row
        if least > key:
            if gl.load(shape.bounds + HEADER + tile * FIELDS) == least:  # the same for all, as behind padding
                s = gl.where((rows >= least - key)[:, None], s, float("-inf"))
            else:
                lo = gl.load(shape.bounds + at + cols) - key
                s = gl.where(rows[:, None] >= lo[None, :], s, float("-inf"))
        if end < key + HALF:
            hi = gl.load(shape.bounds + at + shape.batch * shape.tiles * ROWS + cols) - key
            s = gl.where(rows[:, None] < hi[None, :], s, float("-inf"))
    else:
        if key + HALF > shape.kv_len:
            s = gl.where((rows < shape.kv_len - key)[:, None], s, float("-inf"))
    return s


@gluon.jit
def is_biased(first, b, shape):
    """Not 0 where biases say more than the bounds. first: a tile with a query that sees a key. Only with BIASED."""
    return gl.load(shape.bounds + HEADER + (b * shape.tiles + first) * FIELDS + 5)


@gluon.jit
def load_bias(at, key, layout: gl.constexpr, shape):
    """What a consumer's keys add to exponents, in base 2: [HALF]. at: where that of the first key is. Keys past the
    last add 0: `mask` hides them."""
    rows = gl.arange(0, HALF, layout=layout)
    return gl.load(shape.bias + at + rows, mask=rows < shape.kv_len - key, other=0.0)


@gluon.jit
def with_bias(x, bias):
    """Exponents with the biases of their keys. Beside the least float32 the log-sum-exp is coarse: what should be 0 or
    less may be a great number then."""
    return gl.minimum(x + bias[:, None], 0.0)


@gluon.jit
def drop_unseen(keys, n, b, group: gl.constexpr, shape, cfg):
    """Writes 0 over a consumer's keys (or values) that no query sees: they may hold NaN, and so would the products of
    the dS that is 0. keys: [KEYS, D] in shared memory. Others see it after a fence and a barrier."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    seen = gl.load(seen_at(n, b, shape, cfg) + group * HALF + rows) != 0
    own = keys.slice(group * HALF, HALF, dim=0)
    for column in gl.static_range(0, cfg.D, _WIDE):
        part = own.slice(column, _WIDE, dim=1)
        x = part.load(layout)
        part.store(gl.where(seen[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
