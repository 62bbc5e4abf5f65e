"""The producer of the Hopper forward: one warp that has the copy engine bring queries, keys and values."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ...._compat.gluon import barrier, load_tile
from .parts import NO_TILES, ROWS, SEGMENTS
from .tiles import (
    block_start,
    first_row,
    listed_index,
    read_list,
    read_part,
    share,
    span,
    start_walk,
    tile,
    total_tiles,
)
from .turns import next_slot

_ROWS = gl.constexpr(8)  # of a block, that `_drop_before` takes at a time, and of each as many values
_COLUMNS = gl.constexpr(64)


@gluon.jit
def produce(q_desc, k_desc, v_desc, mask_desc, pipe, shape, cfg):
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    total = total_tiles(shape, cfg, 1)
    mine = share(total, pid, programs)
    level, before, count = start_walk(shape, cfg, 1)
    slot = 0
    phase = 1
    q_slot = 0
    q_phase = 1
    # The block before this one, whose values are still to be loaded.
    last_b = 0
    last_h = 0
    last_row = 0
    last_slot = 0
    last_before = 0
    own_phase = 0
    mask_slot = 0
    mask_phase = 1
    for i in range(mine):
        m, b, h, level, before, count = tile(i, total, pid, programs, level, before, count, shape, cfg, 1)
        kv_head = h // shape.group
        anchor, first, n = span(m, b, h, shape, cfg)
        listed = 0
        index = 0
        if cfg.MASK == SEGMENTS:
            listed = read_part(m, shape)
        if cfg.LISTED:
            listed = read_list(m, b, h, shape, cfg)
            index = listed_index(listed, 0)
        for group in gl.static_range(2):
            full = pipe.q_full.index(q_slot * 2 + group)
            mbarrier.wait(pipe.q_empty.index(q_slot * 2 + group), q_phase)
            mbarrier.expect(full, ROWS * cfg.D * 2)
            row = first_row(m, listed, cfg) + group * ROWS
            load_tile(q_desc, [b, h, row, 0], full, pipe.q.index(q_slot * 2 + group))
        for j in range(n):
            if cfg.LISTED:
                row = index * cfg.BLOCK_N
                if j + 1 < n:  # early: it is there when it is needed
                    index = listed_index(listed, j + 1)
            else:
                row = block_start(anchor, first, j, cfg)
            mbarrier.wait(pipe.empty.index(slot), phase)
            full = pipe.k_full.index(slot)
            mbarrier.expect(full, cfg.BLOCK_N * cfg.D * 2)
            load_tile(k_desc, [b, kv_head, row, 0], full, pipe.k.index(slot))
            if (i > 0) | (j > 0):
                own_phase = _load_values(v_desc, pipe, last_b, last_h, last_row, last_slot, last_before, own_phase, cfg)
            if cfg.TILES != NO_TILES:
                wanted = j >= 0
                if cfg.LISTED:
                    wanted = j < listed.others  # type: ignore[attr-defined]
                if wanted:
                    mbarrier.wait(pipe.mask_empty.index(mask_slot), mask_phase)
                    full = pipe.mask_full.index(mask_slot)
                    mbarrier.expect(full, cfg.BLOCK_M * cfg.BLOCK_N * (mask_desc.dtype.primitive_bitwidth // 8))
                    for group in gl.static_range(2):
                        place = [b * shape.bias_b, h * shape.bias_h, m * cfg.BLOCK_M + group * ROWS, row]
                        load_tile(mask_desc, place, full, pipe.mask.index(mask_slot * 2 + group))
                    mask_slot, mask_phase = next_slot(mask_slot, mask_phase, cfg.MASK_STAGES)
            last_b = b
            last_h = kv_head
            last_row = row
            last_slot = slot
            if cfg.MASK == SEGMENTS:
                last_before = anchor - row  # above 0 only in a tile of one block
            slot, phase = next_slot(slot, phase, cfg.STAGES)
        q_slot, q_phase = next_slot(q_slot, q_phase, cfg.Q_SLOTS)
    # The last values' slot is free once the block STAGES before is.
    mbarrier.wait(pipe.empty.index(slot), phase)
    _load_values(v_desc, pipe, last_b, last_h, last_row, last_slot, last_before, own_phase, cfg)


@gluon.jit
def _load_values(v_desc, pipe, b, h, row, slot, before, own_phase, cfg):
    """Has a block of values brought. Returns the next phase of the producer's own barrier.

    before: how many of the block's keys lie before the first that its tile sees. With SEGMENTS these are others', and
    may hold anything, NaN too, which a probability of 0 does not make 0 in the product. So the producer waits for such
    a block itself, writes 0 to them, and only then says that the block is there: the consumers know nothing of it.
    """
    full = pipe.v_full.index(slot)
    block = pipe.v.index(slot)
    if cfg.MASK == SEGMENTS:
        if before > 0:
            own = pipe.own.index(0)
            mbarrier.expect(own, cfg.BLOCK_N * cfg.DV * 2)
            load_tile(v_desc, [b, h, row, 0], own, block)
            mbarrier.wait(own, own_phase)
            own_phase ^= 1
            _drop_before(block.reshape([cfg.BLOCK_N, cfg.DV]), before, cfg)
            mbarrier.arrive(full)
        else:
            mbarrier.expect(full, cfg.BLOCK_N * cfg.DV * 2)
            load_tile(v_desc, [b, h, row, 0], full, block)
    else:
        mbarrier.expect(full, cfg.BLOCK_N * cfg.DV * 2)
        load_tile(v_desc, [b, h, row, 0], full, block)
    return own_phase


@gluon.jit
def _drop_before(v, before, cfg):
    """Writes 0 to the first rows of a block [BLOCK_N, DV] in shared memory. By one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for row in gl.static_range(0, cfg.BLOCK_N, _ROWS):
        if row < before:
            keys = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
            for column in gl.static_range(0, cfg.DV, _COLUMNS):
                part = v.slice(row, _ROWS, dim=0).slice(column, _COLUMNS, dim=1)
                x = part.load(layout)
                part.store(gl.where((keys >= before)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    barrier()
