"""A consumer of the Hopper forward: four warps that hold 64 rows of a tile and multiply."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .masking import drop_unseen, is_cut, load_bias, look, mask, masked_blocks, share_bias, with_tile
from .output import clear, store
from .parts import ADDITIVE, ALIGNED, BAND, INTERVALS, NO_TILES, ROWS, SEGMENTS
from .softmax import as_operand, bent, close, decay_of, exponentials, first_block, largest, pack, partial_sums
from .tiles import block_start, end_row, first_row, listed_index, share, span, start_walk, tile, total_tiles
from .turns import next_slot, pass_turn, stay_below, take_turn


@gluon.jit
def _attend(
    q, pipe, acc, base, l_i, p, slot, phase, mask_slot, mask_phase, m, b, n, anchor, first, inner, scale, zero, seen,
    group: gl.constexpr, shape, cfg,
):  # fmt: skip
    """All of a tile's blocks but the first, to whose P it adds up; the last block's P is left to the caller.

    base: a row's largest score so far, which its exponents are counted from. Kept scaled: where the largest score stays
    the difference of two bases is then exactly 0, also that of a row that has not seen a key. (With biases of keys it
    is not scaled: see `exponentials`.)
    """
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    cut, edge = masked_blocks(anchor, first, n, seen, group, shape, cfg)
    for j in range(1, n):
        if cfg.MASK == INTERVALS:
            if seen.gaps != 0:
                mbarrier.wait(pipe.v_full.index(slot), phase)
                v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
                drop_unseen(v, block_start(anchor, first, j - 1, cfg), anchor, seen.gaps, m, b, shape, cfg)
        p_operand = as_operand(p, pipe.v.dtype, p_layout, cfg)
        k_slot, k_phase = next_slot(slot, phase, cfg.STAGES)
        if cfg.KEYS:
            bias = load_bias(anchor, first, j, scale, seen, cfg)
        if cfg.LISTED:
            index = listed_index(seen, j)  # early: it is there when it is needed
        mbarrier.wait(pipe.k_full.index(k_slot), k_phase)
        k = pipe.k.index(k_slot).reshape([cfg.BLOCK_N, cfg.D])
        take_turn(group, cfg)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        pass_turn(group, cfg)
        if cfg.KEYS:
            share_bias(bias, pipe, seen, group)
        mbarrier.wait(pipe.v_full.index(slot), phase)
        v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
        acc = warpgroup_mma(p_operand, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        s = bent(s, inner, pipe, seen, group, cfg)
        if cfg.LISTED:
            if j < seen.others:
                s, mask_slot, mask_phase = with_tile(s, scale, pipe, mask_slot, mask_phase, group, cfg)
                if is_cut(index, anchor, first, group, shape, cfg):
                    s = mask(s, anchor, first, index, seen, group, shape, cfg)
            elif cfg.TILES == ADDITIVE:
                s = s * scale
        elif cfg.TILES != NO_TILES:
            s, mask_slot, mask_phase = with_tile(s, scale, pipe, mask_slot, mask_phase, group, cfg)
        if not cfg.LISTED and (
            cfg.MASK == BAND
            or cfg.MASK == INTERVALS
            or cfg.MASK == SEGMENTS
            or (cfg.MASK == ALIGNED and cfg.BLOCK_N < cfg.BLOCK_M)
        ):
            if (j >= cut) | (j < edge):
                s = mask(s, anchor, first, j, seen, group, shape, cfg)
        new_base = gl.maximum(base, largest(s, scale, cfg))
        p = exponentials(s, new_base, scale, cfg)
        decay = decay_of(base, new_base, scale, cfg)
        base = new_base
        l_i = l_i * gl.convert_layout(decay, gl.SliceLayout(1, l_i.type.layout))[:, None] + partial_sums(p, cfg)
        stay_below(n)
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
        p = pack(p, pipe.v.dtype, cfg)  # only now: into the registers that the product read
        mbarrier.arrive(pipe.empty.index(k_slot))
        acc = acc * gl.convert_layout(decay, row_layout)[:, None]
        slot = k_slot
        phase = k_phase
    return acc, base, l_i, p, slot, phase, mask_slot, mask_phase


@gluon.jit
def _drop_last(pipe, slot, phase, m, b, n, anchor, first, seen, shape, cfg):
    """`drop_unseen` for a tile's last block. Not before the tile's queries are given back: the producer, which waits
    for their place, loads the last values later."""
    if cfg.MASK == INTERVALS:
        start = block_start(anchor, first, n - 1, cfg)
        if (seen.gaps != 0) | (gl.maximum(start, 0) < anchor):
            mbarrier.wait(pipe.v_full.index(slot), phase)
            v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
            drop_unseen(v, start, anchor, seen.gaps, m, b, shape, cfg)


@gluon.jit
def consume(pipe, results, inner, scale, group: gl.constexpr, shape, cfg):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    total = total_tiles(shape, cfg, 4)
    mine = share(total, pid, programs)
    level, before, count = start_walk(shape, cfg, 4)
    zero = gl.zeros([ROWS, cfg.BLOCK_N], gl.float32, s_layout)
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    mask_slot = 0
    mask_phase = 0
    if group == 1:
        pass_turn(1, cfg)
    m, b, h, level, before, count = tile(0, total, pid, programs, level, before, count, shape, cfg, 4)
    anchor, first, n = span(m, b, h, shape, cfg)
    seen = look(m, b, h, group, row_layout, shape, cfg)
    if cfg.KEYS:
        share_bias(load_bias(anchor, first, 0, scale, seen, cfg), pipe, seen, group)
    mbarrier.wait(pipe.q_full.index(group), 0)
    mbarrier.wait(pipe.k_full.index(0), 0)
    q = pipe.q.index(group).reshape([ROWS, cfg.D])
    k = pipe.k.index(0).reshape([cfg.BLOCK_N, cfg.D])
    take_turn(group, cfg)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    pass_turn(group, cfg)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(pipe.empty.index(0))
    base, l_i, p, mask_slot, mask_phase = first_block(
        s, pipe, mask_slot, mask_phase, anchor, first, inner, scale, seen, group, shape, cfg
    )
    p = pack(p, pipe.v.dtype, cfg)
    for i in range(1, mine):
        acc = gl.zeros([ROWS, cfg.DV], gl.float32, acc_layout)
        q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
        acc, base, l_i, p, slot, phase, mask_slot, mask_phase = _attend(
            q,
            pipe,
            acc,
            base,
            l_i,
            p,
            slot,
            phase,
            mask_slot,
            mask_phase,
            m,
            b,
            n,
            anchor,
            first,
            inner,
            scale,
            zero,
            seen,
            group,
            shape,
            cfg,
        )
        mbarrier.arrive(pipe.q_empty.index(q_slot * 2 + group))
        _drop_last(pipe, slot, phase, m, b, n, anchor, first, seen, shape, cfg)
        done_b = b
        done_h = h
        done_row = first_row(m, seen, cfg) + group * ROWS
        queries = end_row(b, seen, shape, cfg)
        factor = close(base, scale, l_i, b, h, done_row, queries, results, seen, shape, cfg)
        m, b, h, level, before, count = tile(i, total, pid, programs, level, before, count, shape, cfg, 4)
        anchor, first, n = span(m, b, h, shape, cfg)
        seen = look(m, b, h, group, row_layout, shape, cfg)
        # This tile's last product with values, beside the next tile's first block.
        p_operand = as_operand(p, pipe.v.dtype, p_layout, cfg)
        q_slot, q_phase = next_slot(q_slot, q_phase, cfg.Q_SLOTS)
        k_slot, k_phase = next_slot(slot, phase, cfg.STAGES)
        if cfg.KEYS:
            bias = load_bias(anchor, first, 0, scale, seen, cfg)
        mbarrier.wait(pipe.q_full.index(q_slot * 2 + group), q_phase)
        mbarrier.wait(pipe.k_full.index(k_slot), k_phase)
        q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
        k = pipe.k.index(k_slot).reshape([cfg.BLOCK_N, cfg.D])
        take_turn(group, cfg)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        pass_turn(group, cfg)
        if cfg.KEYS:
            share_bias(bias, pipe, seen, group)
        mbarrier.wait(pipe.v_full.index(slot), phase)
        v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
        acc = warpgroup_mma(p_operand, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        base, l_i, p, mask_slot, mask_phase = first_block(
            s, pipe, mask_slot, mask_phase, anchor, first, inner, scale, seen, group, shape, cfg
        )
        stay_below(n)
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
        p = pack(p, pipe.v.dtype, cfg)
        mbarrier.arrive(pipe.empty.index(k_slot))
        slot = k_slot
        phase = k_phase
        store(acc, factor, done_b, done_h, done_row, queries, results, group, shape, cfg)
    acc = gl.zeros([ROWS, cfg.DV], gl.float32, acc_layout)
    q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
    acc, base, l_i, p, slot, phase, mask_slot, mask_phase = _attend(
        q,
        pipe,
        acc,
        base,
        l_i,
        p,
        slot,
        phase,
        mask_slot,
        mask_phase,
        m,
        b,
        n,
        anchor,
        first,
        inner,
        scale,
        zero,
        seen,
        group,
        shape,
        cfg,
    )
    _drop_last(pipe, slot, phase, m, b, n, anchor, first, seen, shape, cfg)
    row = first_row(m, seen, cfg) + group * ROWS
    queries = end_row(b, seen, shape, cfg)
    factor = close(base, scale, l_i, b, h, row, queries, results, seen, shape, cfg)
    p_operand = as_operand(p, pipe.v.dtype, p_layout, cfg)
    mbarrier.wait(pipe.v_full.index(slot), phase)
    v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
    acc = warpgroup_mma(p_operand, v, acc, is_async=True)
    acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
    store(acc, factor, b, h, row, queries, results, group, shape, cfg)
    if group == 0:  # the other's last turn: a barrier must not be left half full
        take_turn(0, cfg)
    clear(pid, programs, total, group, results, shape, cfg)
    if cfg.STAGED:
        tma.store_wait(0)
