"""A consumer of the Hopper backward: four warps that hold 64 keys of the block and multiply."""

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

from ...._compat.gluon import barrier, reinterpret, store_tile
from .masking import common_range, drop_unseen, load_bias, mask, with_bias
from .parts import HALF, INTERVALS, ROWS
from .steps import first_step, next_step
from .sums import add, add_to_block, count_on, place
from .tiles import block_of, holes_in_keys, program, visitors


@gluon.jit
def meet():
    """Waits for the other consumer (named barrier 9, 256 threads)."""
    gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def half_of_dims(x, group: gl.constexpr, cfg):
    """All rows of [1, 1, rows, D], half of their dims: these lie together in shared memory."""
    DIMS: gl.constexpr = cfg.D // 2
    BYTES: gl.constexpr = min(2 * DIMS, 128)
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BYTES, element_bitwidth=16, rank=2)
    return reinterpret(x, x.dtype, [2, x.shape[2], DIMS], layout).index(group)


@gluon.jit
def rows_of(x, group: gl.constexpr, cfg):
    """A part of the keys' or values' place that takes a consumer's dK or dV, [HALF, D]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return reinterpret(x, x.dtype, [2, HALF, cfg.D], layout).index(group)


@gluon.jit
def consume(pipe, results, group: gl.constexpr, shape, cfg):
    """In each step, for a tile of queries: S and dP, transposed; P and dS from them; then

        dV += P^T dO,    dS to shared memory,    dQ = dS K (half of its dims each),    dK += dS^T Q.

    No product is under way from one step to the next: the assembler would wait after each.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cfg.D // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = pipe.q.dtype
    n, b, kv_head, head = block_of(program(shape, cfg), shape, cfg)
    first, end = visitors(n, b, shape, cfg)
    zero = gl.zeros([HALF, ROWS], gl.float32, s_layout)
    zero_dq = gl.zeros([ROWS, cfg.D // 2], gl.float32, dq_layout)
    dk = gl.zeros([HALF, cfg.D], gl.float32, acc_layout)
    dv = gl.zeros([HALF, cfg.D], gl.float32, acc_layout)
    k_all = pipe.k.index(0).reshape([cfg.KEYS, cfg.D])
    v_all = pipe.v.index(0).reshape([cfg.KEYS, cfg.D])
    k = k_all.slice(group * HALF, HALF, 0)
    v = v_all.slice(group * HALF, HALF, 0)
    k_dims = half_of_dims(pipe.k.index(0), group, cfg)
    key = n * cfg.KEYS + group * HALF
    m, tile, bias_at, steps, end_of_heads, biased = first_step(first, end, b, head, key, shape, cfg)
    if steps > 0:
        mbarrier.wait(pipe.keys_full.index(0), 0)
        mbarrier.wait(pipe.keys_full.index(1), 0)
        if cfg.MASK == INTERVALS:
            if holes_in_keys(n, b, shape, cfg) != 0:
                drop_unseen(k_all, n, b, group, shape, cfg)
                drop_unseen(v_all, n, b, group, shape, cfg)
                meet()
    for i in range(steps):
        slot = i & 1
        phase = (i >> 1) & 1
        least, past = common_range(m, b, shape, cfg)
        mbarrier.wait(pipe.q_full.index(slot), phase)
        q = pipe.q.index(slot).reshape([ROWS, cfg.D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(pipe.grad_out_full.index(slot), phase)
        grad_out = pipe.grad_out.index(slot).reshape([ROWS, cfg.D])
        dp = warpgroup_mma(v, grad_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if cfg.SOFTCAP:
            s = tanh(s * results.inner)
        s = mask(s, m, 0, b, key, least, past, shape, cfg)
        x = s * results.scale - pipe.lse.index(slot).load(columns)[None, :]
        if cfg.BIASED:
            if biased != 0:
                x = with_bias(x, load_bias(bias_at, key, rows, shape))  # from the L1 cache: kept, they cost more
        p = gl.exp2(x)
        p_operand = gl.convert_layout(p.to(dtype), operand)
        if cfg.SOFTCAP:  # now, so that the scores need no registers any more
            s = gl.maximum(s, -1.0)  # where it is hidden, and P is 0
            p = p * (1.0 - s * s)
        dv = warpgroup_mma(p_operand, grad_out, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - pipe.delta.index(slot).load(columns)[None, :])).to(dtype)
        shared = pipe.ds.index(slot)
        shared.slice(group * HALF, HALF, 0).store(ds)
        ds_operand = gl.convert_layout(ds, operand)
        fence_async_shared()
        meet()
        dq = warpgroup_mma(shared.permute((1, 0)), k_dims, zero_dq, use_acc=False, is_async=True)
        if cfg.ORDERED:
            mbarrier.wait(pipe.turn.index(0), i & 1)  # not later: the assembler would have dK waited for as well
        dv, p_operand = warpgroup_mma_wait(1, deps=[dv, p_operand])
        dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        at = tile.to(gl.int64) * (ROWS * cfg.D) + group * (ROWS * (cfg.D // 2))
        add(results.dq_sum + at + place(dq_layout, cfg.D // 2), dq)
        count_on(pipe, slot, cfg)
        dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
        mbarrier.arrive(pipe.empty.index(slot))
        m, tile, bias_at = next_step(m, tile, bias_at, first, end, end_of_heads, shape, cfg)
    dk = dk * results.factor
    if cfg.SPLIT:
        if steps > 0:
            inside = group * (HALF * cfg.D) + place(acc_layout, cfg.D)
            add_to_block(results, pipe, dk, dv, n, b, kv_head, inside, steps & 1, shape, cfg)
    else:
        meet()  # the other consumer has read its keys and values
        _store(results.dv, rows_of(pipe.v.index(0), group, cfg), dv.to(dtype), b, kv_head, key, cfg)
        _store(results.dk, rows_of(pipe.k.index(0), group, cfg), dk.to(dtype), b, kv_head, key, cfg)
        tma.store_wait(0)


@gluon.jit
def _store(descriptor, staging, x, b, kv_head, key, cfg):
    staging.store(x)
    fence_async_shared()
    barrier()
    store_tile(descriptor, [b, kv_head, key, 0], staging.reshape([1, 1, HALF, cfg.D]))
