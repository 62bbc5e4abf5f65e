"""Attention forward for Hopper (SM 9.0), in Gluon: the kernel. `launch.py` launches it.

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

The files, from the whole to its parts: `producer.py` and `consumer.py`; of a consumer `softmax.py`, `masking.py`,
`output.py`; of both `tiles.py` (which tile, which keys), `turns.py` (waiting for each other), `parts.py` (the values
that are passed around).
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .consumer import consume
from .parts import NO_TILES, ROWS, SEGMENTS, Config, Pipe, Results, Shape
from .producer import produce

#: Never specialised, and without a known alignment: one binary serves every length.
INTEGERS = [
    "batch", "heads", "group", "q_len", "kv_len", "left", "right", "rows", "section", "dv8", "bias_b", "bias_h",
    "list_b", "list_h", "list_m",
]  # fmt: skip


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INTEGERS)
def forward_kernel(
    q_desc,  # [B, Hq, Sq, D] in boxes of [1, 1, ROWS, D]
    k_desc,  # [B, Hkv, Skv, D] in boxes of [1, 1, BLOCK_N, D]
    v_desc,  # [B, Hkv, Skv, Dv]
    out_desc,  # [B, Hq, Sq, Dv], or None where not STAGED
    mask_desc,  # [B|1, H|1, Sq, Skv] in boxes of [1, 1, ROWS, BLOCK_N], or None
    out_ptr,
    lse_ptr,  # from here on None where the configuration says so
    sinks_ptr,
    q_lengths_ptr,
    kv_lengths_ptr,
    bounds_ptr,  # int32, see `bounds.py`; with LISTED `block_lists.py`
    bias_ptr,  # float32 [B|1, H|1, Skv]
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
    bias_b,
    bias_h,
    list_b,
    list_h,
    list_m,
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
    KEYS: gl.constexpr,
    TILES: gl.constexpr,
    MASK_STAGES: gl.constexpr,
    LISTED: gl.constexpr,
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
        KEYS,
        TILES,
        MASK_STAGES,
        LISTED,
        Q_LENGTHS,
        KV_LENGTHS,
        SINKS,
        SOFTCAP,
        LSE,
        TURNS,
    )
    shape = Shape(
        q_lengths_ptr, kv_lengths_ptr, bounds_ptr, bias_ptr, batch, heads, group, q_len, kv_len, left, right, rows,
        section, bias_b, bias_h, list_b, list_h, list_m,
    )  # fmt: skip
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    bias = None
    if KEYS:
        bias = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tiles = None
    tiles_full = None
    tiles_empty = None
    if TILES != NO_TILES:
        tiles = gl.allocate_shared_memory(mask_desc.dtype, [2 * MASK_STAGES, 1, 1, ROWS, BLOCK_N], mask_desc.layout)
        tiles_full = gl.allocate_shared_memory(gl.int64, [MASK_STAGES, 1], flags)
        tiles_empty = gl.allocate_shared_memory(gl.int64, [MASK_STAGES, 1], flags)
        for i in gl.static_range(MASK_STAGES):
            mbarrier.init(tiles_full.index(i), count=1)
            mbarrier.init(tiles_empty.index(i), count=2)
    own = None
    if MASK == SEGMENTS:
        own = gl.allocate_shared_memory(gl.int64, [1, 1], flags)
        mbarrier.init(own.index(0), count=1)
    pipe = Pipe(
        gl.allocate_shared_memory(q_desc.dtype, [2 * Q_SLOTS, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout),
        gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], flags),
        gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        bias,
        tiles,
        tiles_full,
        tiles_empty,
        own,
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
            (consume, (pipe, results, inner, scale, 0, shape, cfg)),
            (consume, (pipe, results, inner, scale, 1, shape, cfg)),
            (produce, (q_desc, k_desc, v_desc, mask_desc, pipe, shape, cfg)),
        ],
        [4, 1],
        [240, 24],
    )
