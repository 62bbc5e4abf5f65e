"""The softmax of the Hopper forward: exponents, sums, and the probabilities as the left operand of a product.

Scores stay as the product gives them. `scale` (times log2(e), for exp2) is applied inside the exponent, where it costs
nothing; with a softcap it is the cap that is applied there, and the scores are tanh(score * inner). Biases of keys are
divided by it and added to the scores.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .masking import mask, with_bias, with_tile
from .parts import ADDITIVE, FULL, INTERVALS, NO_TILES, ROWS
from .tiles import stored_rows

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
#: The base of a row without keys: finite, so that no -inf - -inf arises. With a bias exponents may be as low as -1e38.
_LEAST = gl.constexpr(-1e30)
_LEAST_BIASED = gl.constexpr(-3e38)
_LEAST_OF_TILES = gl.constexpr(-3.4028234663852886e38)  # and scores as low as any float32


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def bent(s, inner, pipe, seen, group: gl.constexpr, cfg):
    """The scores under a softcap and with the keys' biases."""
    if cfg.SOFTCAP:
        s = _tanh(s * inner)
    if cfg.KEYS:
        s = with_bias(s, pipe, seen, group)
    return s


@gluon.jit
def first_block(s, pipe, mask_slot, mask_phase, anchor, first, inner, scale, seen, group: gl.constexpr, shape, cfg):
    """Softmax of a tile's first block: the rows' bases (see `attend`) and sums, P, and where the mask's next tile is.

    The one block that always may be cut.
    """
    s = bent(s, inner, pipe, seen, group, cfg)
    if cfg.TILES != NO_TILES:
        s, mask_slot, mask_phase = with_tile(s, scale, pipe, mask_slot, mask_phase, group, cfg)
    if cfg.LISTED:
        s = mask(s, anchor, first, seen.index, seen, group, shape, cfg)
    else:
        s = mask(s, anchor, first, 0, seen, group, shape, cfg)
    least: gl.constexpr = _LEAST_OF_TILES if cfg.TILES == ADDITIVE else _LEAST_BIASED if cfg.KEYS else _LEAST
    base = gl.maximum(largest(s, scale, cfg), least)
    p = exponentials(s, base, scale, cfg)
    return base, partial_sums(p, cfg), p, mask_slot, mask_phase


@gluon.jit
def largest(s, scale, cfg):
    """The largest score of each row, as bases are kept: scaled, but with biases of keys unscaled, and under an additive
    mask as it is (scaled without log2(e))."""
    top = gl.max(s, 1)
    return top if cfg.KEYS or cfg.TILES == ADDITIVE else top * scale


@gluon.jit
def exponentials(s, base, scale, cfg):
    """P. s: the scores, unscaled.

    Without biases the difference is one instruction, whose product is not rounded. Where a bias is as low as the least
    float32 that would leave more than 1e30 of the largest score: there the difference comes first, and is exact.
    """
    if cfg.TILES == ADDITIVE:
        return gl.exp2((s - base[:, None]) * _LOG2_E)
    elif cfg.KEYS:
        return gl.exp2((s - base[:, None]) * scale)
    else:
        return gl.exp2(s * scale - base[:, None])


@gluon.jit
def decay_of(base, new_base, scale, cfg):
    """What sums and outputs that were counted from one base are multiplied by to be counted from the next."""
    if cfg.TILES == ADDITIVE:
        return gl.exp2((base - new_base) * _LOG2_E)
    elif cfg.KEYS:
        return gl.exp2((base - new_base) * scale)
    else:
        return gl.exp2(base - new_base)


@gluon.jit
def partial_sums(p, cfg):
    """Row sums as far as one thread holds them, [ROWS, 8]: the threads add theirs up once a tile."""
    return gl.sum(p.reshape([ROWS, cfg.BLOCK_N // 8, 8]), 1)


@gluon.jit
def pack(p, dtype: gl.constexpr, cfg):
    """P as it is carried from step to step: rounded, two columns in one int32, [ROWS, BLOCK_N / 2].

    That is half the registers: with a mask more of them would spill, and 16-bit values by themselves take one each.
    Without a mask there is room for P in float32, and rounding it later, beside the next step's first product, is 3%
    faster.
    """
    if cfg.MASK == FULL and cfg.TILES == NO_TILES:
        return p
    else:
        low, high = gl.split(p.reshape([ROWS, p.shape[1] // 2, 2]))
        kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
        asm: gl.constexpr = "cvt.rn." + kind + ".f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def as_operand(p, dtype: gl.constexpr, layout: gl.constexpr, cfg):
    """What `pack` made, as the left operand of a product."""
    if cfg.MASK == FULL and cfg.TILES == NO_TILES:
        return gl.convert_layout(p.to(dtype), layout)
    else:
        low = p.to(gl.int16).to(dtype, bitcast=True)
        high = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
        return gl.convert_layout(gl.join(low, high).reshape([ROWS, 2 * p.shape[1]]), layout)


@gluon.jit
def close(base, scale, l_i, b, h, row, queries, results, seen, shape, cfg):
    """What a tile's output is to be multiplied by, as a row vector; stores the log-sum-exp.

    row, queries: the first row, and how many rows batch entry b has: rows from there on see nothing. With SEGMENTS
    `tiles.end_row`: rows from there on are others', of any sum.
    """
    layout: gl.constexpr = base.type.layout
    if cfg.KEYS:
        base = base * scale
    if cfg.TILES == ADDITIVE:
        base = gl.maximum(base * _LOG2_E, _LEAST_BIASED)  # finite: a row of finfo.min sees keys
    total = gl.convert_layout(gl.sum(l_i, 1), layout)
    rows = row + gl.arange(0, ROWS, layout=layout)
    if cfg.Q_LENGTHS:  # whatever the queries past the length hold
        total = gl.where(rows < queries, total, 0.0)
        base = gl.where(rows < queries, base, _LEAST)
    if cfg.MASK == INTERVALS:  # or those that see no key: the blocks that all others see are not masked
        total = gl.where(seen.lo < seen.hi, total, 0.0)
        base = gl.where(seen.lo < seen.hi, base, _LEAST)
    shrink = 1.0
    if cfg.SINKS:  # one more score, whose value is 0
        sink = gl.load(results.sinks + h).to(gl.float32) * _LOG2_E
        top = gl.maximum(base, sink)
        shrink = gl.exp2(base - top)
        total = total * shrink + gl.exp2(sink - top)
        base = top
    if cfg.LSE:
        lse = (base + gl.log2(total)) * _LN_2
        at = (b.to(gl.int64) * shape.heads + h) * shape.q_len + rows
        gl.store(results.lse + at, lse, mask=rows < stored_rows(queries, shape, cfg))
    factor = shrink / gl.where(total == 0.0, 1.0, total)
    if cfg.MASK == INTERVALS:
        factor = gl.where(seen.lo < seen.hi, factor, 0.0)  # `store` makes it a 0, whatever there is
    return factor
