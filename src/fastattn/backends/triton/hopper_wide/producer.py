"""The producer of the Hopper forward for wide heads: one warp that has the copy engine bring queries, keys, values."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...._compat.gluon import load_tile
from ..hopper.tiles import share
from .parts import HALF, KEYS, REST_COLUMNS, ROWS
from .tiles import item, total_items


@gluon.jit
def _bring(desc, b, head, row, part, phase, pipe):
    """Both halves of a block, into parts `part` and `part + 1`."""
    for half in gl.static_range(2):
        full = pipe.full.index(part + half)
        mbarrier.wait(pipe.empty.index(part + half), phase ^ 1)
        mbarrier.expect(full, KEYS * HALF * 2)
        load_tile(desc, [b, head, row, half * HALF], full, pipe.kv.index(part + half))


@gluon.jit
def _bring_queries(desc, rest_desc, at, phase, pipe, cfg):
    full = pipe.q_full.index(0)
    mbarrier.wait(pipe.q_empty.index(0), phase ^ 1)
    mbarrier.expect(full, ROWS * (2 * HALF + (REST_COLUMNS if cfg.REST else 0)) * 2)
    for half in gl.static_range(2):
        load_tile(desc, [at.b, at.head, at.query, half * HALF], full, pipe.q.index(half))
    if cfg.REST:
        load_tile(rest_desc, [at.b, at.head, at.query, 2 * HALF], full, pipe.q_rest)


@gluon.jit
def produce(q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, pipe, shape, cfg):
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    mine = share(total_items(shape), pid, programs)
    turn = 0  # of the pair, over all items
    for i in range(mine):
        at = item(i, pid, programs, shape, cfg)
        row = at.first
        for j in range(at.pairs):
            for owner in gl.static_range(2):
                if cfg.SAME:
                    _bring(k_desc, at.b, at.kv_head, row, 2 * owner, turn, pipe)
                else:
                    _bring(k_desc, at.b, at.kv_head, row, 0, owner, pipe)
                if owner == 0:
                    if j == 0:  # behind the first keys, whose place is free earlier
                        _bring_queries(q_desc, q_rest_desc, at, i & 1, pipe, cfg)
                if cfg.REST:
                    full = pipe.rest_full.index(owner)
                    mbarrier.wait(pipe.rest_empty.index(owner), turn ^ 1)
                    mbarrier.expect(full, KEYS * REST_COLUMNS * 2)
                    load_tile(k_rest_desc, [at.b, at.kv_head, row, 2 * HALF], full, pipe.k_rest.index(owner))
                if not cfg.SAME:
                    _bring(v_desc, at.b, at.kv_head, row, 2, owner, pipe)
                row -= KEYS
            turn ^= 1
