"""The producer of the Hopper backward: one warp that has the copy engine bring keys, values, and tiles of queries."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...._compat.gluon import load_tile
from ..hopper.turns import next_slot
from .parts import INTERVALS, ROWS, STAGES
from .tiles import block_of, holes_in_queries, program, visitors


@gluon.jit
def produce(loads, pipe, shape, cfg):
    n, b, kv_head, head = block_of(program(shape, cfg), shape, cfg)
    first, end = visitors(n, b, shape, cfg)
    if first < end:
        mbarrier.expect(pipe.keys_full.index(0), cfg.KEYS * cfg.D * 2)
        load_tile(loads.k, [b, kv_head, n * cfg.KEYS, 0], pipe.keys_full.index(0), pipe.k.index(0))
        mbarrier.expect(pipe.keys_full.index(1), cfg.KEYS * cfg.D * 2)
        load_tile(loads.v, [b, kv_head, n * cfg.KEYS, 0], pipe.keys_full.index(1), pipe.v.index(0))
    slot = 0
    phase = 1
    if cfg.ORDERED:
        for i in range(first, end):
            for g in range(shape.share):
                _load(loads, pipe, first + end - 1 - i, b, head + g, slot, phase, shape, cfg)
                slot, phase = next_slot(slot, phase, STAGES)
    else:
        for g in range(shape.share):
            for m in range(first, end):
                _load(loads, pipe, m, b, head + g, slot, phase, shape, cfg)
                slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _load(loads, pipe, m, b, h, slot, phase, shape, cfg):
    """Tile m of query head h."""
    tile = (b * shape.heads + h) * shape.tiles + m
    mbarrier.wait(pipe.empty.index(slot), phase)
    full = pipe.q_full.index(slot)
    mbarrier.expect(full, ROWS * cfg.D * 2 + ROWS * 4)
    load_tile(loads.rows, [tile * (2 * ROWS)], full, pipe.lse.index(slot))
    late = pipe.grad_out_full.index(slot)
    if cfg.MASK == INTERVALS:
        if holes_in_queries(m, b, h, shape, cfg) != 0:
            load_tile(loads.clean_q, [b, h, m * ROWS, 0], full, pipe.q.index(slot))
            mbarrier.expect(late, ROWS * cfg.D * 2 + ROWS * 4)
            load_tile(loads.clean_grad_out, [b, h, m * ROWS, 0], late, pipe.grad_out.index(slot))
        else:
            load_tile(loads.q, [b, h, m * ROWS, 0], full, pipe.q.index(slot))
            mbarrier.expect(late, ROWS * cfg.D * 2 + ROWS * 4)
            load_tile(loads.grad_out, [b, h, m * ROWS, 0], late, pipe.grad_out.index(slot))
    else:
        load_tile(loads.q, [b, h, m * ROWS, 0], full, pipe.q.index(slot))
        mbarrier.expect(late, ROWS * cfg.D * 2 + ROWS * 4)
        load_tile(loads.grad_out, [b, h, m * ROWS, 0], late, pipe.grad_out.index(slot))
    load_tile(loads.rows, [tile * (2 * ROWS) + ROWS], late, pipe.delta.index(slot))
