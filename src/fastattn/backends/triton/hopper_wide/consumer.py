"""A consumer of the Hopper forward for wide heads: four warps that hold half of a tile's output."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...._compat.gluon import barrier
from ..hopper.tiles import share
from ..hopper.turns import here
from .output import store
from .parts import HALF, KEYS, REST_COLUMNS, ROWS
from .tiles import is_cut, item, mask, total_items

#: The base of a row without keys: finite, so that no -inf - -inf arises.
_LEAST = gl.constexpr(-1e30)


@gluon.jit
def _part(i, pipe):
    return pipe.kv.index(i).reshape([KEYS, HALF])


@gluon.jit
def _phase(owner: gl.constexpr, turn, cfg):
    """Of the barriers of a block of consumer `owner` in pair `turn`. Without SAME each block takes the place of the one
    before it, with SAME of the one two before it."""
    if cfg.SAME:
        return turn
    else:
        return turn * 0 + owner


@gluon.jit
def _issue_scores(pipe, zero, turn, group: gl.constexpr, cfg):
    """The product of the queries and of the keys of this consumer's block, in two products, or three."""
    keys: gl.constexpr = 2 * group if cfg.SAME else 0
    phase = _phase(group, turn, cfg)
    # The compiler would keep the addresses of all operands in registers all through the loop, and spill them.
    none = here(turn * 0)
    q = pipe.q.index(none).reshape([ROWS, HALF])
    mbarrier.wait(pipe.full.index(keys), phase)
    s = warpgroup_mma(q, _part(none + keys, pipe).permute((1, 0)), zero, use_acc=False, is_async=True)
    q = pipe.q.index(none + 1).reshape([ROWS, HALF])
    mbarrier.wait(pipe.full.index(keys + 1), phase)
    s = warpgroup_mma(q, _part(none + (keys + 1), pipe).permute((1, 0)), s, is_async=True)
    if cfg.REST:
        mbarrier.wait(pipe.rest_full.index(group), turn)
        k = pipe.k_rest.index(group).reshape([KEYS, REST_COLUMNS])
        s = warpgroup_mma(pipe.q_rest.reshape([ROWS, REST_COLUMNS]), k.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _free_keys(pipe, cfg):
    """After the scores: keys that are no values are not needed any more, and the next ones wait for their place."""
    if not cfg.SAME:
        mbarrier.arrive(pipe.empty.index(0))
        mbarrier.arrive(pipe.empty.index(1))


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _publish_bases(s, base, inner, scale, start, at, pipe, group: gl.constexpr, shape, cfg):
    """Of one block the scores, masked, and the rows' new bases: their largest scores so far, scaled. The other consumer
    gets these first: while this one computes P, it multiplies its output by what they ask for."""
    if cfg.SOFTCAP:
        s = _tanh(s * inner)
    if is_cut(start, at, shape, cfg):
        s = mask(s, start, at, shape, cfg)
    new_base = gl.maximum(base, gl.max(s, 1) * scale)
    pipe.bases.index(group).store(new_base)
    barrier()
    mbarrier.arrive(pipe.bases_full.index(group))
    return s, new_base


@gluon.jit
def _publish(s, base, scale, last, pipe, group: gl.constexpr, cfg):
    """Computes P, and puts it where the other consumer finds it. The last one who read what was there is this one: it
    had to, before it could compute this P. What else the scores needed is free now, after a tile's last ones the
    queries, too."""
    p = gl.exp2(s * scale - base[:, None])
    rounded = p.to(pipe.p.dtype)
    pipe.p.store(rounded)
    fence_async_shared()
    barrier()
    mbarrier.arrive(pipe.p_full.index(group))
    if cfg.REST:
        mbarrier.arrive(pipe.rest_empty.index(group))
    mbarrier.arrive(pipe.q_empty.index(0), pred=last)
    return p, rounded


@gluon.jit
def _partial_sums(p):
    """Row sums as far as one thread holds them, [ROWS, 8]."""
    return gl.sum(p.reshape([ROWS, KEYS // 8, 8]), 1)


@gluon.jit
def _times(x, factor):
    """Rows of x times a row vector."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _take(pipe, acc, base, l_i, turn, group: gl.constexpr, cfg):
    """The product of the other consumer's last P, in pair `turn`, and this one's half of the values, to its end."""
    owner: gl.constexpr = 1 - group
    part: gl.constexpr = 2 * owner + group if cfg.SAME else 2 + group
    mbarrier.wait(pipe.bases_full.index(owner), turn)
    new_base = pipe.bases.index(owner).load(base.type.layout)
    decay = gl.exp2(base - new_base)
    acc = _times(acc, decay)
    mbarrier.wait(pipe.p_full.index(owner), turn)
    mbarrier.wait(pipe.full.index(part), _phase(owner, turn, cfg))
    acc = warpgroup_mma(pipe.p, _part(here(turn * 0) + part, pipe), acc, is_async=True)
    l_i = _times(l_i, decay)
    acc = warpgroup_mma_wait(0, deps=[acc])
    # Before anything else is waited for: where keys and values come slowly, this part's place is what they wait for.
    mbarrier.arrive(pipe.empty.index(part))
    return acc, new_base, l_i


@gluon.jit
def _give(p, acc, pipe, turn, group: gl.constexpr, cfg):
    """The product of this consumer's P, from registers, and its half of the values, to its end."""
    part: gl.constexpr = 2 * group + group if cfg.SAME else 2 + group
    mbarrier.wait(pipe.full.index(part), _phase(group, turn, cfg))
    acc = warpgroup_mma(p, _part(here(turn * 0) + part, pipe), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(pipe.empty.index(part))
    return acc


@gluon.jit
def _step(pipe, acc, base, l_i, zero, before, turn, start, last, inner, scale, at, group: gl.constexpr, shape, cfg):
    """One block of this consumer, and the other's block before it, which was computed in pair `before`. last: after it
    this consumer needs the queries no more."""
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    acc, base, l_i = _take(pipe, acc, base, l_i, before, group, cfg)
    s = _issue_scores(pipe, zero, turn, group, cfg)
    s = warpgroup_mma_wait(0, deps=[s])
    _free_keys(pipe, cfg)
    s, new_base = _publish_bases(s, base, inner, scale, start, at, pipe, group, shape, cfg)
    p, rounded = _publish(s, new_base, scale, last, pipe, group, cfg)
    decay = gl.exp2(base - new_base)
    acc = _times(acc, decay)
    l_i = _times(l_i, decay) + _partial_sums(p)
    acc = _give(gl.convert_layout(rounded, p_layout), acc, pipe, turn, group, cfg)
    return acc, new_base, l_i


@gluon.jit
def consume(pipe, results, inner, scale, group: gl.constexpr, shape, cfg):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    mine = share(total_items(shape), pid, programs)
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    turn = 0
    for i in range(mine):
        at = item(i, pid, programs, shape, cfg)
        acc = gl.zeros([ROWS, HALF], gl.float32, acc_layout)
        base = gl.full([ROWS], _LEAST, gl.float32, row_layout)
        mbarrier.wait(pipe.q_full.index(0), i & 1)
        if group == 0:
            # The first block, before which there is none.
            s = _issue_scores(pipe, zero, turn, 0, cfg)
            s = warpgroup_mma_wait(0, deps=[s])
            _free_keys(pipe, cfg)
            s, base = _publish_bases(s, base, inner, scale, at.first, at, pipe, 0, shape, cfg)
            p, rounded = _publish(s, base, scale, at.pairs == 1, pipe, 0, cfg)
            l_i = _partial_sums(p)
            acc = _give(gl.convert_layout(rounded, p_layout), acc, pipe, turn, 0, cfg)
            for j in range(1, at.pairs):
                start = at.first - 2 * KEYS * j
                last = j == at.pairs - 1
                acc, base, l_i = _step(
                    pipe, acc, base, l_i, zero, turn, turn ^ 1, start, last, inner, scale, at, 0, shape, cfg
                )
                turn ^= 1
            # The last block is the other consumer's.
            acc, base, l_i = _take(pipe, acc, base, l_i, turn, 0, cfg)
            turn ^= 1
        else:
            l_i = _partial_sums(zero)
            for j in range(0, at.pairs):
                start = at.first - 2 * KEYS * j - KEYS
                last = j == at.pairs - 1
                acc, base, l_i = _step(
                    pipe, acc, base, l_i, zero, turn, turn, start, last, inner, scale, at, 1, shape, cfg
                )
                turn ^= 1
        total = gl.convert_layout(gl.sum(l_i, 1), row_layout)
        pipe.sums.index(group).store(total)
        barrier()
        mbarrier.arrive(pipe.sums_full.index(group))
        mbarrier.wait(pipe.sums_full.index(1 - group), i & 1)
        total += pipe.sums.index(1 - group).load(row_layout)
        store(acc, base, total, at, results, group, shape, cfg)
