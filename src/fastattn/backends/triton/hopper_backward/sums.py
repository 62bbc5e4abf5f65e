"""Sums in memory: several programs add to the same float32 numbers, 16 bytes at a time.

A product leaves four neighbouring registers of a thread with two pairs of columns, eight rows apart. The sums are kept
in that order, so that each thread adds 16 bytes and neighbours add to neighbouring 16 bytes: of a part of 64 rows,
number (row, column) lies at `place`. `finish.py` brings rows and columns back.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ...._compat.gluon import barrier


@gluon.jit
def place(layout: gl.constexpr, COLUMNS: gl.constexpr):
    """Where the numbers of 64 rows lie: eight columns after eight; of them thread after thread, four numbers each."""
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    thread_of_row = (r >> 4) * 32 + (r & 7) * 4
    at_row = thread_of_row * 4 + ((r >> 3) & 1) * 2
    at_column = (c >> 3) * 512 + ((c >> 1) & 3) * 4 + (c & 1)
    return at_row[:, None] + at_column[None, :]


@gluon.jit
def add(pointers, x):
    """Adds float32 x to what is at the pointers, which lie as `place` says."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; "
        "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [pointers.to(gl.int64, bitcast=True), x],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def add_to_block(results, pipe, dk, dv, n, b, kv_head, inside, slot, shape, cfg):
    """Adds a consumer's dK and dV to those of its block, which programs share. inside: where they lie in the block.
    slot: of the step after the last one."""
    all_blocks = shape.batch * shape.kv_heads * shape.blocks
    block = (b * shape.kv_heads + kv_head) * shape.blocks + n
    if cfg.ORDERED:
        mbarrier.wait(pipe.turn.index(0), slot)
    add(results.dkv_sum + block.to(gl.int64) * (cfg.KEYS * cfg.D) + inside, dv)
    add(results.dkv_sum + (block + all_blocks).to(gl.int64) * (cfg.KEYS * cfg.D) + inside, dk)
    count_on(pipe, slot, cfg)


@gluon.jit
def count_on(pipe, slot, cfg):
    """With ORDERED: tells the warps of `order.py` that a consumer has added."""
    if cfg.ORDERED:
        barrier()  # all four warps have
        mbarrier.arrive(pipe.added.index(slot))
