"""A consumer of the Hopper backward for wide heads: four warps that hold half of the dims of a block's dK and dV.

The registers of two consumers have room for the dK and dV of 64 keys of 256 dims. Both consumers need P and dS of all
of them, for all queries of a tile. Each computes those of half of the queries, and puts them into shared memory.
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

from ...._compat.gluon import store_tile
from ..hopper.turns import here
from .consumer import half_of_dims, meet, tanh
from .masking import common_range, drop_unseen, load_bias, mask, with_bias
from .parts import HALF, INTERVALS, ROWS
from .steps import first_step, next_step
from .sums import add, add_to_block, count_on, place
from .tiles import block_of, holes_in_keys, program, visitors

_QUERIES = gl.constexpr(ROWS // 2)  # of a tile, whose scores a consumer computes


@gluon.jit
def consume_wide(pipe, results, group: gl.constexpr, shape, cfg):
    """In each step, for half of a tile's queries: S and dP, transposed; P and dS from them, to shared memory. Then, for
    half of the dims and all queries of the tile:

        dV += P^T dO,    dQ = dS K,    dK += dS^T Q.

    No product is under way from one step to the next: the assembler would wait after each.

    The consumers meet twice a step, when P is there, and when dS is. Who writes dS has met the other one over P, which
    had done all of the step before then: one place is enough. Who writes P may find it at the step before: P has two.
    """
    DIMS: gl.constexpr = cfg.D // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _QUERIES, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIMS, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = pipe.q.dtype
    n, b, kv_head, head = block_of(program(shape, cfg), shape, cfg)
    first, end = visitors(n, b, shape, cfg)
    zero = gl.zeros([HALF, _QUERIES], gl.float32, s_layout)
    zero_dq = gl.zeros([ROWS, DIMS], gl.float32, acc_layout)
    dk = gl.zeros([HALF, DIMS], gl.float32, acc_layout)
    dv = gl.zeros([HALF, DIMS], gl.float32, acc_layout)
    key = n * HALF
    own: gl.constexpr = group * _QUERIES  # the first of the consumer's queries
    m, tile, bias_at, steps, end_of_heads, biased = first_step(first, end, b, head, key, shape, cfg)
    if steps > 0:
        mbarrier.wait(pipe.keys_full.index(0), 0)
        mbarrier.wait(pipe.keys_full.index(1), 0)
        if cfg.MASK == INTERVALS:
            if holes_in_keys(n, b, shape, cfg) != 0:
                if group == 0:
                    drop_unseen(pipe.k.index(0).reshape([HALF, cfg.D]), n, b, 0, shape, cfg)
                else:
                    drop_unseen(pipe.v.index(0).reshape([HALF, cfg.D]), n, b, 0, shape, cfg)
                meet()
    for i in range(steps):
        slot = i & 1
        phase = (i >> 1) & 1
        least, past = common_range(m, b, shape, cfg)
        # The compiler would keep the addresses of all operands in registers all through the loop, and spill them.
        none = here(i * 0)
        k = pipe.k.index(none).reshape([HALF, cfg.D])
        v = pipe.v.index(none).reshape([HALF, cfg.D])
        mbarrier.wait(pipe.q_full.index(slot), phase)
        q = pipe.q.index(slot)
        own_q = q.reshape([ROWS, cfg.D]).slice(own, _QUERIES, 0)
        s = warpgroup_mma(k, own_q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(pipe.grad_out_full.index(slot), phase)
        grad_out = pipe.grad_out.index(slot)
        own_grad_out = grad_out.reshape([ROWS, cfg.D]).slice(own, _QUERIES, 0)
        dp = warpgroup_mma(v, own_grad_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if cfg.SOFTCAP:
            s = tanh(s * results.inner)
        s = mask(s, m, own, b, key, least, past, shape, cfg)
        x = s * results.scale - pipe.lse.index(slot).slice(own, _QUERIES, 0).load(columns)[None, :]
        if cfg.BIASED:
            if biased != 0:
                x = with_bias(x, load_bias(bias_at, key, rows, shape))
        p = gl.exp2(x)
        shared_p = pipe.p.index(slot)
        shared_p.slice(own, _QUERIES, 1).store(p.to(dtype))
        fence_async_shared()
        if cfg.SOFTCAP:
            s = gl.maximum(s, -1.0)  # where it is hidden, and P is 0
            p = p * (1.0 - s * s)
        meet()
        dv = warpgroup_mma(shared_p, half_of_dims(grad_out, group, cfg), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = p * (dp - pipe.delta.index(slot).slice(own, _QUERIES, 0).load(columns)[None, :])
        shared = pipe.ds.index(0)
        shared.slice(own, _QUERIES, 1).store(ds.to(dtype))
        fence_async_shared()
        meet()
        k_dims = half_of_dims(pipe.k.index(none), group, cfg)
        dq = warpgroup_mma(shared.permute((1, 0)), k_dims, zero_dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(shared, half_of_dims(q, group, cfg), dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=[dq, dv])
        at = tile.to(gl.int64) * (ROWS * cfg.D) + group * (ROWS * DIMS)
        if cfg.ORDERED:
            mbarrier.wait(pipe.turn.index(0), i & 1)
        add(results.dq_sum + at + place(acc_layout, DIMS), dq)
        count_on(pipe, slot, cfg)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(pipe.empty.index(slot))
        m, tile, bias_at = next_step(m, tile, bias_at, first, end, end_of_heads, shape, cfg)
    dk = dk * results.factor
    if cfg.SPLIT:
        if steps > 0:
            inside = group * (HALF * DIMS) + place(acc_layout, DIMS)
            add_to_block(results, pipe, dk, dv, n, b, kv_head, inside, steps & 1, shape, cfg)
    else:
        # Since the last meeting the other consumer reads only its own half of the keys' dims.
        half_of_dims(pipe.v.index(0), group, cfg).store(dv.to(dtype))
        half_of_dims(pipe.k.index(0), group, cfg).store(dk.to(dtype))
        fence_async_shared()
        meet()
        if group == 0:
            store_tile(results.dv, [b, kv_head, key, 0], pipe.v.index(0))
        else:
            store_tile(results.dk, [b, kv_head, key, 0], pipe.k.index(0))
        tma.store_wait(0)
