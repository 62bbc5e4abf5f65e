"""The producer of the Hopper forward: one warp that has the copy engine bring queries, keys and values."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...._compat.gluon import load_tile
from .parts import ROWS
from .tiles import block_start, share, span, start_walk, tile, total_tiles
from .turns import next_slot


@gluon.jit
def produce(q_desc, k_desc, v_desc, pipe, shape, cfg):
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
    for i in range(mine):
        m, b, h, level, before, count = tile(i, total, pid, programs, level, before, count, shape, cfg, 1)
        kv_head = h // shape.group
        anchor, first, n = span(m, b, shape, cfg)
        for group in gl.static_range(2):
            full = pipe.q_full.index(q_slot * 2 + group)
            mbarrier.wait(pipe.q_empty.index(q_slot * 2 + group), q_phase)
            mbarrier.expect(full, ROWS * cfg.D * 2)
            row = m * cfg.BLOCK_M + group * ROWS
            load_tile(q_desc, [b, h, row, 0], full, pipe.q.index(q_slot * 2 + group))
        for j in range(n):
            row = block_start(anchor, first, j, cfg)
            mbarrier.wait(pipe.empty.index(slot), phase)
            full = pipe.k_full.index(slot)
            mbarrier.expect(full, cfg.BLOCK_N * cfg.D * 2)
            load_tile(k_desc, [b, kv_head, row, 0], full, pipe.k.index(slot))
            if (i > 0) | (j > 0):
                full = pipe.v_full.index(last_slot)
                mbarrier.expect(full, cfg.BLOCK_N * cfg.DV * 2)
                load_tile(v_desc, [last_b, last_h, last_row, 0], full, pipe.v.index(last_slot))
            last_b = b
            last_h = kv_head
            last_row = row
            last_slot = slot
            slot, phase = next_slot(slot, phase, cfg.STAGES)
        q_slot, q_phase = next_slot(q_slot, q_phase, cfg.Q_SLOTS)
    # The last values' slot is free once the block STAGES before is.
    mbarrier.wait(pipe.empty.index(slot), phase)
    full = pipe.v_full.index(last_slot)
    mbarrier.expect(full, cfg.BLOCK_N * cfg.DV * 2)
    load_tile(v_desc, [last_b, last_h, last_row, 0], full, pipe.v.index(last_slot))
