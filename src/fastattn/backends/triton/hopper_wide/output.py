"""What the consumers of the Hopper forward for wide heads store."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hopper.tiles import queries_of
from .parts import HALF, ROWS

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_LEAST = gl.constexpr(-1e30)


@gluon.jit
def _queries_and_heads(at, layout: gl.constexpr, shape):
    """Of each row."""
    rows = gl.arange(0, ROWS, layout=layout)
    within = rows & (shape.queries - 1)
    return at.query + within, at.head + (rows - within) // shape.queries


@gluon.jit
def store(acc, base, total, at, results, group: gl.constexpr, shape, cfg):
    """One consumer's half of the output of a tile; the first one stores the log-sum-exp, too.

    base, total: of each row, what its exponents were counted from and the sum of all its probabilities.
    """
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    base = gl.convert_layout(base, layout)
    total = gl.convert_layout(total, layout)
    queries, heads = _queries_and_heads(at, layout, shape)
    all_heads = shape.kv_heads * shape.group
    there = queries < shape.q_len
    if cfg.Q_LENGTHS:  # whatever the queries past the length hold
        counted = queries < queries_of(at.b, shape, cfg)
        total = gl.where(counted, total, 0.0)
        base = gl.where(counted, base, _LEAST)
        acc = gl.where(counted[:, None], acc, 0.0)
    dv = results.dv8 * 8
    cols = group * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, acc.type.layout))
    inside = there[:, None] & (cols < dv)[None, :]
    if cfg.SPLIT:
        count = shape.q_len * shape.group
        parts = (shape.batch * shape.kv_heads).to(gl.int64) * shape.splits * count
        tile = (at.b * shape.kv_heads + at.kv_head).to(gl.int64) * shape.splits + at.split
        part = tile * count + (queries * shape.group + heads - at.kv_head * shape.group)
        gl.store(results.scratch + (part * dv)[:, None] + cols[None, :], acc, mask=inside)
        if group == 0:
            largest = gl.where(total == 0.0, float("-inf"), base * _LN_2)
            gl.store(results.scratch + parts * dv + part, largest, mask=there)
            gl.store(results.scratch + parts * (dv + 1) + part, total, mask=there)
    else:
        shrink = 1.0
        if cfg.SINKS:  # one more score, whose value is 0
            sink = gl.load(results.sinks + heads).to(gl.float32) * _LOG2_E
            top = gl.maximum(base, sink)
            shrink = gl.exp2(base - top)
            total = total * shrink + gl.exp2(sink - top)
            base = top
        if cfg.LSE:
            if group == 0:
                lse = (base + gl.log2(total)) * _LN_2
                gl.store(results.lse + (at.b.to(gl.int64) * all_heads + heads) * shape.q_len + queries, lse, mask=there)
        factor = shrink / gl.where(total == 0.0, 1.0, total)
        out = (acc * factor[:, None]).to(results.out.dtype.element_ty)
        place = ((at.b.to(gl.int64) * shape.q_len + queries) * all_heads + heads) * dv
        gl.store(results.out + place[:, None] + cols[None, :], out, mask=inside)
