"""Attention forward for Hopper (SM 9.0) and wide heads, in Gluon: the kernel. `launch.py` launches it.

Head dims above 256, up to 576, with value dims up to 512. A tile has 64 rows, and its output, 64 x 512 numbers, is more
than four warps have registers for: two groups of four warps, the consumers, hold 256 columns each. So each consumer
multiplies the probabilities P of every block of keys with its half of the values; the scores of a block only one of
them computes, the two in turns, and hands P to the other through shared memory. For its block i a consumer

    takes P(i-1) from the other: O += P(i-1) V(i-1), its half of the columns; then S(i) = Q K(i)^T,
    computes P(i) and puts it into shared memory, where the other finds it,
    O += P(i) V(i), its half, while the other, which has P(i) now, does the same and goes on with S(i+1).

So both halves of O += P V are computed at the same time, and after them the next block's scores. A row's exponents are
counted from the largest score of all blocks so far, its base, which goes from one consumer to the other ahead of P, so
that O is rescaled while P is computed; sums of P are added up at the end of a tile.

A warp more, the producer, has the copy engine (TMA) bring queries, keys and values, in parts of 64 x 256. Barriers in
shared memory (mbarrier) say when a part is there ("full") and when it may be overwritten ("empty"). Where the values
are the keys' first columns (absorbed MLA), each block is read once: two blocks are in shared memory. Else there is one
of keys and one of values.

The rows of a tile are some heads of one group, each with a few neighbouring queries: heads that share their keys share
the reading of them. One description of the queries covers that: its boxes have several heads.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .consumer import consume
from .parts import HALF, KEYS, REST_COLUMNS, ROWS, Config, Pipe, Results, Shape
from .producer import produce

#: Never specialised, and without a known alignment: one binary serves every length.
INTEGERS = [
    "batch", "kv_heads", "group", "q_len", "kv_len", "left", "right", "rows", "queries", "blocks", "splits", "dv8",
]  # fmt: skip


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INTEGERS)
def wide_kernel(
    q_desc,  # [B, Hq, Sq, D] in boxes of [1, 64 / queries, queries, HALF]
    q_rest_desc,  # the same in boxes of REST_COLUMNS, or None
    k_desc,  # [B, Hkv, Skv, D] in boxes of [1, 1, KEYS, HALF]
    k_rest_desc,
    v_desc,  # [B, Hkv, Skv, Dv], or None where SAME
    out_ptr,
    lse_ptr,  # from here on None where the configuration says so
    sinks_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    scratch_ptr,
    batch,
    kv_heads,
    group,
    q_len,
    kv_len,
    left,
    right,
    rows,
    queries,
    blocks,
    splits,
    dv8,
    inner,
    scale,
    REST: gl.constexpr,
    SAME: gl.constexpr,
    BAND: gl.constexpr,
    SPLIT: gl.constexpr,
    Q_LENGTHS: gl.constexpr,
    KV_LENGTHS: gl.constexpr,
    SINKS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
):
    cfg = Config(REST, SAME, BAND, SPLIT, Q_LENGTHS, KV_LENGTHS, SINKS, SOFTCAP, LSE)
    shape = Shape(
        q_lengths_ptr, kv_lengths_ptr, batch, kv_heads, group, q_len, kv_len, left, right, rows, queries, blocks, splits
    )
    results = Results(out_ptr, lse_ptr, sinks_ptr, scratch_ptr, dv8)
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    p_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_rest = None
    k_rest = None
    rest_full = None
    rest_empty = None
    if REST:
        q_rest = gl.allocate_shared_memory(q_desc.dtype, [1, 1, ROWS, REST_COLUMNS], q_rest_desc.layout)
        k_rest = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, KEYS, REST_COLUMNS], k_rest_desc.layout)
        rest_full = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
        rest_empty = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
        for i in gl.static_range(2):
            mbarrier.init(rest_full.index(i), count=1)
            mbarrier.init(rest_empty.index(i), count=1)
    pipe = Pipe(
        gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, HALF], q_desc.layout),
        q_rest,
        gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, KEYS, HALF], k_desc.layout),
        k_rest,
        gl.allocate_shared_memory(q_desc.dtype, [ROWS, KEYS], p_layout),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], row_layout),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], row_layout),
        gl.allocate_shared_memory(gl.int64, [1, 1], flags),
        gl.allocate_shared_memory(gl.int64, [1, 1], flags),
        gl.allocate_shared_memory(gl.int64, [4, 1], flags),
        gl.allocate_shared_memory(gl.int64, [4, 1], flags),
        rest_full,
        rest_empty,
        gl.allocate_shared_memory(gl.int64, [2, 1], flags),
        gl.allocate_shared_memory(gl.int64, [2, 1], flags),
        gl.allocate_shared_memory(gl.int64, [2, 1], flags),
    )
    mbarrier.init(pipe.q_full.index(0), count=1)
    mbarrier.init(pipe.q_empty.index(0), count=2)
    for i in gl.static_range(4):
        mbarrier.init(pipe.full.index(i), count=1)
        mbarrier.init(pipe.empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(pipe.bases_full.index(i), count=1)
        mbarrier.init(pipe.p_full.index(i), count=1)
        mbarrier.init(pipe.sums_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (pipe, results, inner, scale, 0, shape, cfg)),
            (consume, (pipe, results, inner, scale, 1, shape, cfg)),
            (produce, (q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, pipe, shape, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
