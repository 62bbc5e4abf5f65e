"""A fixed order for what programs of the Hopper backward add to the same sums, so that bits repeat from run to run.

Programs have numbers, in the order in which they begin: a program takes the next ticket first of all, whatever the GPU
starts where. `tiles.block_of` gives the blocks of keys of a head to programs in rising order. Then

- to a tile of dQ blocks add one after the other, in rising order. The tile's counter says how many have;
- to dK and dV of a block that programs share, they add in the order of their heads. The block has such a counter, too.

**Nobody waits for ever.** A program waits only for smaller numbers: for what programs of earlier blocks of its head
add, and for those of earlier heads that share its block. These began before it did, so they are at work or done: no
program holds a place on the GPU that one needs for which it waits. And the smallest number that is not done waits for
nobody. That holds beside other work, too, and where not all programs fit on the GPU together; a program that the driver
takes off the GPU with others comes back with them.

**Nobody waits long.** With a causal mask, later blocks are seen by the last tiles only. So all begin with the last tile
and go downwards, each a step behind the block before it; where later blocks end, no earlier one has anything for them
to wait for. All heads of a tile come one after the other: were it all tiles of a head, a block would wait at each next
head until the first block had come down to tile 0. (Tests: `test_order.py`.)

Two warps see to it. `give_turns` waits for the counter of the next tile while the consumers multiply, and tells them by
a barrier in shared memory, `turn`, that they may add. They tell `count_turns` by `added` that they have; it waits until
that is where others see it, and sets the counter. Reading a counter acquires, at the scope of the GPU, and setting it
releases what the consumers did before `added`.

A tile between others that see a block may see nothing of it. It is visited, and zeros are added, in any order.

The counters, int32, begin at 0 (`prepare.py`): one for each tile `[B, Hq, tiles]`; with SPLIT one for each block
`[B, Hkv, blocks]`; the next ticket.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..bounds_kernel import FIELDS, HEADER
from .parts import BAND, INTERVALS, ROWS
from .tiles import block_of, program, visitors


@gluon.jit
def take_ticket(counters, batch, heads, kv_heads, tiles, blocks, cfg):
    """The number of this program: all smaller ones have begun."""
    at = batch * heads * tiles
    if cfg.SPLIT:
        at += batch * kv_heads * blocks
    return gl.atomic_add(counters + at, 1, sem="relaxed")


@gluon.jit
def place_in_order(n, m, b, shape, cfg):
    """How many blocks add to tile m before block n, which visits it. Less than 0: block n adds nothing but zeros."""
    first = n * 0  # the block of the first key that the tile sees
    if cfg.MASK == BAND:
        first = gl.maximum(m * ROWS + (shape.kv_len - shape.q_len) - shape.left, 0) // cfg.KEYS
    elif cfg.MASK == INTERVALS:
        at = shape.bounds + HEADER + (b * shape.tiles + m) * FIELDS
        lo = gl.load(at)
        hi = gl.load(at + 1)
        sees = (lo < hi) & (hi > n * cfg.KEYS) & (lo < n * cfg.KEYS + cfg.KEYS)  # as `extents.py` has it
        first = gl.where(sees, gl.maximum(lo, 0) // cfg.KEYS, n + 1)
    return n - first


@gluon.jit
def give_turns(pipe, results, shape, cfg):
    """Lets the consumers add when it is their turn. One warp; its steps are theirs."""
    n, b, kv_head, head = block_of(program(shape, cfg), shape, cfg)
    first, end = visitors(n, b, shape, cfg)
    step = 0
    for i in range(first, end):
        m = first + end - 1 - i
        place = place_in_order(n, m, b, shape, cfg)
        for g in range(shape.share):
            if place > 0:
                wait_for(results.counters + tile_of(b, head + g, m, shape), place)
            _give(pipe, step)
            step += 1
    if cfg.SPLIT:
        if first < end:
            part = part_of(kv_head, head, shape)
            if part > 0:
                wait_for(results.counters + shared_block(n, b, kv_head, shape), part)
            _give(pipe, step)


@gluon.jit
def _give(pipe, step):
    """Not before the last step's numbers are added, and those of the last but one counted: no barrier is ahead by more
    than its waiters can tell."""
    mbarrier.wait(pipe.added.index((step - 1) & 1), ((step - 1) >> 1) & 1)
    mbarrier.wait(pipe.counted.index(step & 1), ((step - 2) >> 1) & 1)
    mbarrier.arrive(pipe.turn.index(0))


@gluon.jit
def count_turns(pipe, results, shape, cfg):
    """Counts what the consumers have added. One warp, as `give_turns`."""
    n, b, kv_head, head = block_of(program(shape, cfg), shape, cfg)
    first, end = visitors(n, b, shape, cfg)
    step = 0
    for i in range(first, end):
        m = first + end - 1 - i
        place = place_in_order(n, m, b, shape, cfg)
        for g in range(shape.share):
            mbarrier.wait(pipe.added.index(step & 1), (step >> 1) & 1)
            if place >= 0:
                count(results.counters + tile_of(b, head + g, m, shape), place + 1)
            mbarrier.arrive(pipe.counted.index(step & 1))
            step += 1
    if cfg.SPLIT:
        if first < end:
            mbarrier.wait(pipe.added.index(step & 1), (step >> 1) & 1)
            count(results.counters + shared_block(n, b, kv_head, shape), part_of(kv_head, head, shape) + 1)


@gluon.jit
def tile_of(b, h, m, shape):
    """The counter of a tile of queries."""
    return (b * shape.heads + h) * shape.tiles + m


@gluon.jit
def shared_block(n, b, kv_head, shape):
    """The counter of a block of keys."""
    return (shape.batch * shape.heads) * shape.tiles + (b * shape.kv_heads + kv_head) * shape.blocks + n


@gluon.jit
def part_of(kv_head, head, shape):
    """How many of the programs that share a block have earlier heads."""
    return (head - kv_head * (shape.heads // shape.kv_heads)) // shape.share


@gluon.jit
def wait_for(counter, number):
    """Until the counter has reached the number; what was added before is there then."""
    found = _read(counter)
    while found < number:
        found = _read(counter)


@gluon.jit
def _read(counter):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];",
        "=r,l",
        [counter.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def count(counter, number):
    """Sets the counter, once all that this program's threads have added is where others see it."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.s32 [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [counter.to(gl.int64, bitcast=True), number],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
