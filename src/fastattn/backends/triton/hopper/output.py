"""What the consumers of the Hopper forward store."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ...._compat.gluon import barrier, store_tile
from .parts import INTERVALS, ROWS, SEGMENTS
from .tiles import in_order, queries_of, record, stored_rows


@gluon.jit
def store(acc, factor, b, h, row, queries, results, group: gl.constexpr, shape, cfg):
    """The output of one consumer's rows. factor, queries: see `softmax.close`.

    With SEGMENTS the copy engine stores where all rows are the tile's: it would write over others' else.
    """
    factor = gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))
    out = acc * factor[:, None]
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
    if cfg.Q_LENGTHS:
        out = gl.where((rows < queries)[:, None], out, 0.0)
    if cfg.MASK == INTERVALS:
        out = gl.where((factor != 0.0)[:, None], out, 0.0)
    out = out.to(results.out.dtype.element_ty)
    if cfg.STAGED:
        tma.store_wait(0)  # of the tile before
        barrier()
        staging = results.staging.index(group)
        staging.reshape([ROWS, cfg.DV]).store(out)
        fence_async_shared()
        barrier()
        if cfg.MASK == SEGMENTS:
            if row + ROWS <= queries:
                store_tile(results.descriptor, [b, h, row, 0], staging)
            else:
                _store_some(staging, b, h, row, queries, results, shape, cfg)
        else:
            store_tile(results.descriptor, [b, h, row, 0], staging)
    else:
        _put(out, row, stored_rows(queries, shape, cfg), b, h, results, shape, cfg)


@gluon.jit
def _store_some(staging, b, h, row, end, results, shape, cfg):
    """What is in shared memory, up to row `end`."""
    across: gl.constexpr = cfg.DV // 8  # threads, of 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    _put(staging.reshape([ROWS, cfg.DV]).load(layout), row, end, b, h, results, shape, cfg)


@gluon.jit
def _put(out, row, end, b, h, results, shape, cfg):
    """Writes the rows of one consumer, from `row`, up to row `end`."""
    cols = gl.arange(0, cfg.DV, layout=gl.SliceLayout(0, out.type.layout))
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out.type.layout))
    at = ((b.to(gl.int64) * shape.q_len + rows) * shape.heads + h) * (results.dv8 * 8)
    mask = (rows < end)[:, None] & (cols < results.dv8 * 8)[None, :]
    gl.store(results.out + at[:, None] + cols[None, :], out, mask=mask)


@gluon.jit
def clear(pid, programs, total, group: gl.constexpr, results, shape, cfg):
    """Zeros, and the log-sum-exp of nothing, in the tiles that no program works on: with lengths of queries those that
    have none, with bounds those that see no key, with SEGMENTS pieces of what no tile has. total: tiles of all heads
    that programs work on."""
    if cfg.MASK == INTERVALS:
        for t in range(total + pid, shape.batch * shape.rows * shape.heads, programs):
            rank = t // shape.heads
            m, b = in_order(rank, shape, cfg)
            row = m * cfg.BLOCK_M + group * ROWS
            _clear_rows(row, shape.q_len, b, t - rank * shape.heads, results, shape, cfg)
    elif cfg.MASK == SEGMENTS:
        for t in range(pid, gl.load(shape.bounds + 1) * shape.heads, programs):
            rank = t // shape.heads
            at = record(shape.rows + rank, shape)
            b = gl.load(at)
            row = gl.load(at + 1)
            _clear_rows(row + group * ROWS, row + gl.load(at + 2), b, t - rank * shape.heads, results, shape, cfg)
    elif cfg.Q_LENGTHS:
        for t in range(pid, shape.batch * shape.rows, programs):
            b = t // shape.rows
            m = t - b * shape.rows
            if m * cfg.BLOCK_M >= queries_of(b, shape, cfg):
                for h in range(shape.heads):
                    _clear_rows(m * cfg.BLOCK_M + group * ROWS, shape.q_len, b, h, results, shape, cfg)


@gluon.jit
def _clear_rows(row, end, b, h, results, shape, cfg):
    """The rows of one consumer, from `row`, up to row `end`."""
    across: gl.constexpr = cfg.DV // 8  # threads, of 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    zeros = gl.zeros([ROWS, cfg.DV], results.out.dtype.element_ty, layout)
    _put(zeros, row, end, b, h, results, shape, cfg)
    if cfg.LSE:
        rows = row + gl.arange(0, ROWS, layout=row_layout)
        lse = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        if cfg.SINKS:
            lse = gl.full([ROWS], 0.0, gl.float32, row_layout) + gl.load(results.sinks + h).to(gl.float32)
        gl.store(results.lse + (b.to(gl.int64) * shape.heads + h) * shape.q_len + rows, lse, mask=rows < end)
