"""Which block of keys a program of the Hopper backward has, and which tiles of queries see it.

A program has one block of KEYS keys of one key/value head, and some or all query heads of that head's group. For each
of them it visits the tiles of ROWS queries that may see a key of the block.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .parts import BAND, CAUSAL, INTERVALS, ROWS

_FIELDS = gl.constexpr(4)  # of a block in `extents.py`


@gluon.jit
def program(shape, cfg):
    """Which of the call's programs this is."""
    if cfg.ORDERED:
        return shape.ticket
    else:
        return gl.program_id(0)


@gluon.jit
def block_of(pid, shape, cfg):
    """The block, batch entry, key/value head and first query head of a program.

    Heads (each as often as programs share it) come in `sections` sections of `section` heads, and one of those that
    are left. Within a section programs take the first block of all heads, then the second, and so on: under a causal
    mask the longest come first. What a section's heads read and add to stays in the L2 cache meanwhile.
    """
    every = shape.batch * shape.kv_heads * shape.split
    of_a_section = shape.section * shape.blocks
    section = gl.minimum(pid // of_a_section, shape.sections)
    rest = pid - section * of_a_section
    heads = gl.where(section < shape.sections, shape.section, every - shape.sections * shape.section)
    n = rest // heads
    at = section * shape.section + (rest - n * heads)
    of_an_entry = shape.kv_heads * shape.split
    b = at // of_an_entry
    within = at - b * of_an_entry
    kv_head = within // shape.split
    part = within - kv_head * shape.split
    head = kv_head * (shape.heads // shape.kv_heads) + part * shape.share
    return n, b, kv_head, head


@gluon.jit
def visitors(n, b, shape, cfg):
    """The tiles [first, end) of queries that block n of batch entry b is visited by. first >= end: none."""
    ahead = shape.kv_len - shape.q_len  # position of query 0
    first = n * 0
    end = first + shape.tiles
    if cfg.MASK == CAUSAL:
        first = gl.maximum(n * cfg.KEYS - ahead, 0) // ROWS
    elif cfg.MASK == BAND:
        first = gl.maximum(n * cfg.KEYS - shape.right - ahead, 0) // ROWS
        last = n * cfg.KEYS + cfg.KEYS - 1 + shape.left - ahead  # the last query
        end = gl.minimum(end, (gl.maximum(last, -1) + ROWS) // ROWS)
    elif cfg.MASK == INTERVALS:
        at = shape.extents + (b * shape.blocks + n) * _FIELDS
        first = gl.load(at)
        end = gl.load(at + 1)
    return first, end


@gluon.jit
def holes_in_keys(n, b, shape, cfg):
    """Not 0 where some key of the block is seen by no query. Only with INTERVALS."""
    return gl.load(shape.extents + (b * shape.blocks + n) * _FIELDS + 2)


@gluon.jit
def seen_at(n, b, shape, cfg):
    """Where the extents say of the block's keys which of them is seen."""
    return shape.extents + shape.batch * (shape.blocks * _FIELDS + shape.tiles) + (b * shape.blocks + n) * cfg.KEYS


@gluon.jit
def holes_in_queries(m, b, h, shape, cfg):
    """Not 0 where the tile's queries come from a copy, without those that see nothing. Only with INTERVALS."""
    if cfg.BIASED:
        before = shape.batch * (shape.blocks * (_FIELDS + cfg.KEYS) + shape.tiles)
        return gl.load(shape.extents + before + (b * shape.heads + h) * shape.tiles + m)
    else:
        return gl.load(shape.extents + shape.batch * shape.blocks * _FIELDS + b * shape.tiles + m)
