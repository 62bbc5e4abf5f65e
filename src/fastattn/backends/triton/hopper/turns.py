"""How the warp groups of the Hopper forward wait for each other, beside the barriers of the blocks."""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def take_turn(group: gl.constexpr, cfg):
    """Waits until the other consumer has issued its products (named barriers 9 and 10, 256 threads)."""
    if cfg.TURNS:
        if group == 0:
            gl.inline_asm_elementwise(
                "bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
        else:
            gl.inline_asm_elementwise(
                "bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )


@gluon.jit
def pass_turn(group: gl.constexpr, cfg):
    if cfg.TURNS:
        if group == 0:
            gl.inline_asm_elementwise(
                "bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
        else:
            gl.inline_asm_elementwise(
                "bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )


@gluon.jit
def stay_below(n):
    """A branch that is never taken, but that ptxas cannot remove: it would pull the wait for a product above the
    softmax that should run beside it. n: any number of blocks."""
    gl.inline_asm_elementwise(
        "{ .reg .pred last; again: setp.eq.u32 last, $1, 0x7fffffff; @!last bra.uni on; nanosleep.u32 20; "
        "bra.uni again; on: mov.u32 $0, 0; }",
        "=r,r",
        [n],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def here(x):
    """The integer x, of which nothing can be computed earlier: what a rare branch needs is not to be kept in registers
    all through a loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
