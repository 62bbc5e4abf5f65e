"""Attention forward for Hopper (SM 9.0), in Gluon: the kernel. `hopper_launch.py` launches it.

A persistent program has three groups of warps. One warp, the producer, has the copy engine (TMA) bring tiles of queries
and blocks of keys and values into shared memory. Two groups of four warps, the consumers, hold 64 query rows each and
multiply. Their scores S = Q K^T, and P V, are asynchronous products (wgmma) of the tensor cores; while one runs, the
softmax of another block is computed. In step j a consumer

    issues S(j) = Q K(j)^T        and  O += P(j-1) V(j-1),
    waits for S(j), computes P(j)      while the second product runs,
    waits for O, rescales it.

At the end of a tile step j belongs to the next tile, so that no softmax runs alone. Barriers in shared memory
(mbarrier) say when a block is there ("full") and when it may be overwritten ("empty"); blocks of keys run one ahead of
blocks of values, and a slot's "empty" stands for its keys and for the values of the slot before it.

Scores stay as the product gives them. `scale` (times log2(e), for exp2) is applied inside the exponent, where it costs
nothing; with a softcap it is the cap that is applied there, and the scores are tanh(score * inner).
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...._compat.gluon import aggregate, as_value, barrier, base_value, load_tile, store_tile
from .tiles import (
    ALIGNED,
    BAND,
    FULL,
    Config,
    Shape,
    block_start,
    queries_of,
    share,
    span,
    start_walk,
    tile,
    total_tiles,
)

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_LEAST = gl.constexpr(-1e30)  # the base of a row without keys: finite, so that no -inf - -inf arises
ROWS = gl.constexpr(64)  # query rows of one consumer


@aggregate
class Pipe:
    """Shared memory and its barriers."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, q_full, q_empty, k_full, v_full, empty):
        self.q = q
        self.k = k
        self.v = v
        self.q_full = q_full
        self.q_empty = q_empty
        self.k_full = k_full
        self.v_full = v_full
        self.empty = empty


@aggregate
class Results:
    """Where a consumer puts what it found."""

    descriptor: base_value | gl.constexpr  # of the output
    staging: gl.shared_memory_descriptor | gl.constexpr  # [2, 1, 1, ROWS, DV]
    out: gl.tensor  # [B, Sq, H, Dv], contiguous
    lse: gl.tensor | gl.constexpr  # float32 [B, H, Sq], contiguous
    sinks: gl.tensor | gl.constexpr  # [H]
    dv8: gl.tensor  # Dv / 8

    @gluon.constexpr_function
    def __init__(self, descriptor, staging, out, lse, sinks, dv8):
        self.descriptor = as_value(descriptor)
        self.staging = as_value(staging)
        self.out = out
        self.lse = as_value(lse)
        self.sinks = as_value(sinks)
        self.dv8 = dv8


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _take_turn(group: gl.constexpr, cfg):
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
def _pass_turn(group: gl.constexpr, cfg):
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
def _stay_below(n):
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
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, pipe, shape, cfg):
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
        _, first, n = span(m, b, shape, cfg)
        for group in gl.static_range(2):
            full = pipe.q_full.index(q_slot * 2 + group)
            mbarrier.wait(pipe.q_empty.index(q_slot * 2 + group), q_phase)
            mbarrier.expect(full, ROWS * cfg.D * 2)
            row = m * cfg.BLOCK_M + group * ROWS
            load_tile(q_desc, [b, h, row, 0], full, pipe.q.index(q_slot * 2 + group))
        for j in range(n):
            row = block_start(first, j, cfg)
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
            slot, phase = _next(slot, phase, cfg.STAGES)
        q_slot, q_phase = _next(q_slot, q_phase, cfg.Q_SLOTS)
    # The last values' slot is free once the block STAGES before is.
    mbarrier.wait(pipe.empty.index(slot), phase)
    full = pipe.v_full.index(last_slot)
    mbarrier.expect(full, cfg.BLOCK_N * cfg.DV * 2)
    load_tile(v_desc, [last_b, last_h, last_row, 0], full, pipe.v.index(last_slot))


@gluon.jit
def _mask(s, position, first, group: gl.constexpr, shape, cfg):
    """s with -inf where a row does not see a key. position: of the tile's first query. first: the block's first key."""
    cols = gl.arange(0, cfg.BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
    if cfg.MASK == FULL:
        s = gl.where((cols >= 0 - first)[None, :], s, float("-inf"))
    else:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout)) + (position + group * ROWS - first)
        if cfg.MASK == BAND:
            seen = cols[None, :] <= (rows + shape.right)[:, None]
            seen = seen & (cols[None, :] >= gl.maximum(rows - shape.left, 0 - first)[:, None])
        else:
            seen = cols[None, :] <= rows[:, None]
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def _first_block(s, position, first, inner, scale, group: gl.constexpr, shape, cfg):
    """Softmax of a tile's first block: the rows' bases (see `_attend`) and sums, and P.

    The one block that always may be cut.
    """
    if cfg.SOFTCAP:
        s = _tanh(s * inner)
    s = _mask(s, position, first, group, shape, cfg)
    base = gl.maximum(gl.max(s, 1) * scale, _LEAST)
    p = gl.exp2(s * scale - base[:, None])
    return base, _partial_sums(p, cfg), p


@gluon.jit
def _partial_sums(p, cfg):
    """Row sums as far as one thread holds them, [ROWS, 8]: the threads add theirs up once a tile."""
    return gl.sum(p.reshape([ROWS, cfg.BLOCK_N // 8, 8]), 1)


@gluon.jit
def _pack(p, dtype: gl.constexpr, cfg):
    """P as it is carried from step to step: rounded, two columns in one int32, [ROWS, BLOCK_N / 2].

    That is half the registers: with a mask more of them would spill, and 16-bit values by themselves take one each.
    Without a mask there is room for P in float32, and rounding it later, beside the next step's first product, is 3%
    faster.
    """
    if cfg.MASK == FULL:
        return p
    else:
        low, high = gl.split(p.reshape([ROWS, p.shape[1] // 2, 2]))
        kind: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
        asm: gl.constexpr = "cvt.rn." + kind + ".f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _as_operand(p, dtype: gl.constexpr, layout: gl.constexpr, cfg):
    """What `_pack` made, as the left operand of a product."""
    if cfg.MASK == FULL:
        return gl.convert_layout(p.to(dtype), layout)
    else:
        low = p.to(gl.int16).to(dtype, bitcast=True)
        high = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
        return gl.convert_layout(gl.join(low, high).reshape([ROWS, 2 * p.shape[1]]), layout)


@gluon.jit
def _attend(
    q, pipe, acc, base, l_i, p, slot, phase, n, position, first, inner, scale, zero, group: gl.constexpr, shape, cfg
):
    """All of a tile's blocks but the first, to whose P it adds up; the last block's P is left to the caller.

    base: a row's largest score so far, scaled, which its exponents are counted from. Kept scaled: where the largest
    score stays the difference of two bases is then exactly 0, also that of a row that has not seen a key.
    """
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    # Blocks from `cut` on may hold keys before the first that all rows see; blocks before `edge` keys past the last.
    cut = n
    edge = 0
    if cfg.MASK == BAND:
        bottom = gl.maximum(position + (group * ROWS + ROWS - 1) - shape.left, 0)
        cut = gl.maximum(first + cfg.BLOCK_N - bottom, 0) // cfg.BLOCK_N
    if cfg.BLOCK_N < cfg.BLOCK_M:
        if cfg.MASK == BAND:
            top = position + group * ROWS + shape.right
            edge = (gl.maximum(first + cfg.BLOCK_N - 1 - top, 0) + cfg.BLOCK_N - 1) // cfg.BLOCK_N
        elif cfg.MASK == ALIGNED:
            edge = (cfg.BLOCK_M - group * ROWS + cfg.BLOCK_N - 1) // cfg.BLOCK_N
    for j in range(1, n):
        p_operand = _as_operand(p, pipe.v.dtype, p_layout, cfg)
        k_slot, k_phase = _next(slot, phase, cfg.STAGES)
        mbarrier.wait(pipe.k_full.index(k_slot), k_phase)
        k = pipe.k.index(k_slot).reshape([cfg.BLOCK_N, cfg.D])
        _take_turn(group, cfg)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        _pass_turn(group, cfg)
        mbarrier.wait(pipe.v_full.index(slot), phase)
        v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
        acc = warpgroup_mma(p_operand, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if cfg.SOFTCAP:
            s = _tanh(s * inner)
        if cfg.MASK == BAND or (cfg.MASK == ALIGNED and cfg.BLOCK_N < cfg.BLOCK_M):
            if (j >= cut) | (j < edge):
                s = _mask(s, position, block_start(first, j, cfg), group, shape, cfg)
        new_base = gl.maximum(base, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - new_base[:, None])
        decay = gl.exp2(base - new_base)
        base = new_base
        l_i = l_i * gl.convert_layout(decay, gl.SliceLayout(1, l_i.type.layout))[:, None] + _partial_sums(p, cfg)
        _stay_below(n)
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
        p = _pack(p, pipe.v.dtype, cfg)  # only now: into the registers that the product read
        mbarrier.arrive(pipe.empty.index(k_slot))
        acc = acc * gl.convert_layout(decay, row_layout)[:, None]
        slot = k_slot
        phase = k_phase
    return acc, base, l_i, p, slot, phase


@gluon.jit
def _close(base, l_i, b, h, row, queries, results, shape, cfg):
    """What a tile's output is to be multiplied by, as a row vector; stores the log-sum-exp.

    row, queries: the first row, and how many rows batch entry b has: rows from there on see nothing.
    """
    layout: gl.constexpr = base.type.layout
    total = gl.convert_layout(gl.sum(l_i, 1), layout)
    rows = row + gl.arange(0, ROWS, layout=layout)
    if cfg.Q_LENGTHS:  # whatever the queries past the length hold
        total = gl.where(rows < queries, total, 0.0)
        base = gl.where(rows < queries, base, _LEAST)
    shrink = 1.0
    if cfg.SINKS:  # one more score, whose value is 0
        sink = gl.load(results.sinks + h).to(gl.float32) * _LOG2_E
        top = gl.maximum(base, sink)
        shrink = gl.exp2(base - top)
        total = total * shrink + gl.exp2(sink - top)
        base = top
    if cfg.LSE:
        lse = (base + gl.log2(total)) * _LN_2
        at = (b.to(gl.int64) * shape.heads + h) * shape.q_len + rows
        gl.store(results.lse + at, lse, mask=rows < shape.q_len)
    return shrink / gl.where(total == 0.0, 1.0, total)


@gluon.jit
def _store(acc, factor, b, h, row, queries, results, group: gl.constexpr, shape, cfg):
    out = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
    if cfg.Q_LENGTHS:
        out = gl.where((rows < queries)[:, None], out, 0.0)
    out = out.to(results.out.dtype.element_ty)
    if cfg.STAGED:
        tma.store_wait(0)  # of the tile before
        barrier()
        staging = results.staging.index(group)
        staging.reshape([ROWS, cfg.DV]).store(out)
        fence_async_shared()
        barrier()
        store_tile(results.descriptor, [b, h, row, 0], staging)
    else:
        cols = gl.arange(0, cfg.DV, layout=gl.SliceLayout(0, acc.type.layout))
        at = ((b.to(gl.int64) * shape.q_len + rows) * shape.heads + h) * (results.dv8 * 8)
        mask = (rows < shape.q_len)[:, None] & (cols < results.dv8 * 8)[None, :]
        gl.store(results.out + at[:, None] + cols[None, :], out, mask=mask)


@gluon.jit
def _clear(pid, programs, group: gl.constexpr, results, shape, cfg):
    """Zeros, and the log-sum-exp of nothing, in the tiles that have no query. Only with lengths of queries."""
    across: gl.constexpr = cfg.DV // 8  # threads, of 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    zeros = gl.zeros([ROWS, cfg.DV], results.out.dtype.element_ty, layout)
    cols = gl.arange(0, cfg.DV, layout=gl.SliceLayout(0, layout))
    for t in range(pid, shape.batch * shape.rows, programs):
        b = t // shape.rows
        m = t - b * shape.rows
        if m * cfg.BLOCK_M >= queries_of(b, shape, cfg):
            rows = m * cfg.BLOCK_M + group * ROWS + gl.arange(0, ROWS, layout=row_layout)
            there = rows < shape.q_len
            for h in range(shape.heads):
                at = ((b.to(gl.int64) * shape.q_len + rows) * shape.heads + h) * (results.dv8 * 8)
                mask = there[:, None] & (cols < results.dv8 * 8)[None, :]
                gl.store(results.out + at[:, None] + cols[None, :], zeros, mask=mask)
                if cfg.LSE:
                    lse = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
                    if cfg.SINKS:
                        lse = gl.full([ROWS], 0.0, gl.float32, row_layout) + gl.load(results.sinks + h).to(gl.float32)
                    gl.store(results.lse + (b.to(gl.int64) * shape.heads + h) * shape.q_len + rows, lse, mask=there)


@gluon.jit
def _consume(pipe, results, inner, scale, group: gl.constexpr, shape, cfg):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
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
    if group == 1:
        _pass_turn(1, cfg)
    m, b, h, level, before, count = tile(0, total, pid, programs, level, before, count, shape, cfg, 4)
    position, first, n = span(m, b, shape, cfg)
    mbarrier.wait(pipe.q_full.index(group), 0)
    mbarrier.wait(pipe.k_full.index(0), 0)
    q = pipe.q.index(group).reshape([ROWS, cfg.D])
    k = pipe.k.index(0).reshape([cfg.BLOCK_N, cfg.D])
    _take_turn(group, cfg)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    _pass_turn(group, cfg)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(pipe.empty.index(0))
    base, l_i, p = _first_block(s, position, first, inner, scale, group, shape, cfg)
    p = _pack(p, pipe.v.dtype, cfg)
    for i in range(1, mine):
        acc = gl.zeros([ROWS, cfg.DV], gl.float32, acc_layout)
        q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
        acc, base, l_i, p, slot, phase = _attend(
            q, pipe, acc, base, l_i, p, slot, phase, n, position, first, inner, scale, zero, group, shape, cfg
        )
        mbarrier.arrive(pipe.q_empty.index(q_slot * 2 + group))
        done_b = b
        done_h = h
        done_row = m * cfg.BLOCK_M + group * ROWS
        queries = queries_of(b, shape, cfg)
        factor = _close(base, l_i, b, h, done_row, queries, results, shape, cfg)
        m, b, h, level, before, count = tile(i, total, pid, programs, level, before, count, shape, cfg, 4)
        position, first, n = span(m, b, shape, cfg)
        # This tile's last product with values, beside the next tile's first block.
        p_operand = _as_operand(p, pipe.v.dtype, p_layout, cfg)
        q_slot, q_phase = _next(q_slot, q_phase, cfg.Q_SLOTS)
        k_slot, k_phase = _next(slot, phase, cfg.STAGES)
        mbarrier.wait(pipe.q_full.index(q_slot * 2 + group), q_phase)
        mbarrier.wait(pipe.k_full.index(k_slot), k_phase)
        q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
        k = pipe.k.index(k_slot).reshape([cfg.BLOCK_N, cfg.D])
        _take_turn(group, cfg)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        _pass_turn(group, cfg)
        mbarrier.wait(pipe.v_full.index(slot), phase)
        v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
        acc = warpgroup_mma(p_operand, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        base, l_i, p = _first_block(s, position, first, inner, scale, group, shape, cfg)
        _stay_below(n)
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
        p = _pack(p, pipe.v.dtype, cfg)
        mbarrier.arrive(pipe.empty.index(k_slot))
        slot = k_slot
        phase = k_phase
        _store(acc, factor, done_b, done_h, done_row, queries, results, group, shape, cfg)
    acc = gl.zeros([ROWS, cfg.DV], gl.float32, acc_layout)
    q = pipe.q.index(q_slot * 2 + group).reshape([ROWS, cfg.D])
    acc, base, l_i, p, slot, phase = _attend(
        q, pipe, acc, base, l_i, p, slot, phase, n, position, first, inner, scale, zero, group, shape, cfg
    )
    row = m * cfg.BLOCK_M + group * ROWS
    queries = queries_of(b, shape, cfg)
    factor = _close(base, l_i, b, h, row, queries, results, shape, cfg)
    p_operand = _as_operand(p, pipe.v.dtype, p_layout, cfg)
    mbarrier.wait(pipe.v_full.index(slot), phase)
    v = pipe.v.index(slot).reshape([cfg.BLOCK_N, cfg.DV])
    acc = warpgroup_mma(p_operand, v, acc, is_async=True)
    acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
    _store(acc, factor, b, h, row, queries, results, group, shape, cfg)
    if group == 0:  # the other's last turn: a barrier must not be left half full
        _take_turn(0, cfg)
    if cfg.Q_LENGTHS:
        _clear(pid, programs, group, results, shape, cfg)
    if cfg.STAGED:
        tma.store_wait(0)


#: Never specialised, and without a known alignment: one binary serves every length.
INTEGERS = ["batch", "heads", "group", "q_len", "kv_len", "left", "right", "rows", "section", "dv8"]


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INTEGERS)
def forward_kernel(
    q_desc,  # [B, Hq, Sq, D] in boxes of [1, 1, ROWS, D]
    k_desc,  # [B, Hkv, Skv, D] in boxes of [1, 1, BLOCK_N, D]
    v_desc,  # [B, Hkv, Skv, Dv]
    out_desc,  # [B, Hq, Sq, Dv], or None where not STAGED
    out_ptr,
    lse_ptr,  # from here on None where the configuration says so
    sinks_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    batch,
    heads,
    group,
    q_len,
    kv_len,
    left,
    right,
    rows,
    section,
    dv8,
    inner,
    scale,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr,
    STAGED: gl.constexpr,
    MASK: gl.constexpr,
    Q_LENGTHS: gl.constexpr,
    KV_LENGTHS: gl.constexpr,
    SINKS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    TURNS: gl.constexpr,
):
    cfg = Config(
        BLOCK_M,
        BLOCK_N,
        D,
        DV,
        STAGES,
        Q_SLOTS,
        STAGED,
        MASK,
        Q_LENGTHS,
        KV_LENGTHS,
        SINKS,
        SOFTCAP,
        LSE,
        TURNS,
    )
    shape = Shape(q_lengths_ptr, kv_lengths_ptr, batch, heads, group, q_len, kv_len, left, right, rows, section)
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    pipe = Pipe(
        gl.allocate_shared_memory(q_desc.dtype, [2 * Q_SLOTS, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout),
        gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], flags),
        gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
    )
    staging = None
    if STAGED:
        staging = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, DV], out_desc.layout)
    results = Results(out_desc, staging, out_ptr, lse_ptr, sinks_ptr, dv8)
    for i in gl.static_range(2 * Q_SLOTS):
        mbarrier.init(pipe.q_full.index(i), count=1)
        mbarrier.init(pipe.q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(pipe.k_full.index(i), count=1)
        mbarrier.init(pipe.v_full.index(i), count=1)
        mbarrier.init(pipe.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (pipe, results, inner, scale, 0, shape, cfg)),
            (_consume, (pipe, results, inner, scale, 1, shape, cfg)),
            (_produce, (q_desc, k_desc, v_desc, pipe, shape, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
