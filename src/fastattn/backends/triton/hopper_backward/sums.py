"""Sums in memory: several programs add to the same float32 numbers, 16 bytes at a time.

A product leaves four neighbouring registers of a thread with two pairs of columns, eight rows apart. The sums are kept
in that order, so that each thread adds 16 bytes and neighbours add to neighbouring 16 bytes: of a part of 64 rows,
number (row, column) lies at `place`. `finish.py` brings rows and columns back.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
