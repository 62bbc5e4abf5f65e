"""Attention backward for Hopper (SM 9.0), in Gluon: the main kernel. `launch.py` launches it.

A program has a block of 128 keys of one head and visits the tiles of 64 queries that see it, for each query head of the
group. Its warps are those of the forward: a producer has the copy engine bring keys and values once, and per tile the
queries, dO, log-sum-exp and delta; two consumers have 64 keys each. (Of head dims over 128 a block has 64 keys, and
each consumer half of the dims: `wide_consumer.py`.) dK and dV stay in registers. dQ is a sum over blocks of keys: each
step adds a tile of it to float32 numbers in memory (`sums.py`), which `finish.py` rounds. With ORDERED two more warps
see to it that these additions have a fixed order (`order.py`).

The files, from the whole to its parts: `producer.py`, `consumer.py` and `wide_consumer.py`; of a consumer `steps.py`,
`masking.py` and `sums.py`; of all `tiles.py`. Before the kernel runs `prepare.py`, with bounds of rows also
`extents.py`; after it `finish.py`.
"""

# No `from __future__ import annotations`: Triton reads the annotations as objects.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .consumer import consume
from .order import count_turns, give_turns, take_ticket
from .parts import NARROW, ROWS, STAGES, Config, Loads, Pipe, Results, Shape
from .producer import produce
from .wide_consumer import consume_wide

#: Never specialised, and without a known alignment: one binary serves every length.
INTEGERS = [
    "batch", "heads", "kv_heads", "q_len", "kv_len", "left", "right", "tiles", "blocks", "share", "split", "section",
    "sections",
]  # fmt: skip
#: These are there with BIASED alone.
BIAS_INTEGERS = ["bias_b", "bias_h"]
_NEVER_SPECIALISED = INTEGERS + BIAS_INTEGERS


@gluon.jit
def _consume(pipe, results, group: gl.constexpr, shape, cfg):
    if cfg.D > NARROW:
        consume_wide(pipe, results, group, shape, cfg)
    else:
        consume(pipe, results, group, shape, cfg)


@gluon.jit(do_not_specialize=_NEVER_SPECIALISED, do_not_specialize_on_alignment=_NEVER_SPECIALISED)
def backward_kernel(
    q_desc,  # for shapes see `parts.Loads` and `parts.Results`
    grad_out_desc,
    k_desc,
    v_desc,
    rows_desc,
    dk_desc,
    dv_desc,
    clean_q_desc,  # None where not INTERVALS
    clean_grad_out_desc,
    dq_sum_ptr,
    dkv_sum_ptr,  # from here on None where the configuration says so
    counters_ptr,
    bounds_ptr,
    extents_ptr,
    bias_ptr,
    batch,
    heads,
    kv_heads,
    q_len,
    kv_len,
    left,
    right,
    tiles,
    blocks,
    share,
    split,
    section,
    sections,
    bias_b,
    bias_h,
    inner,
    scale,
    factor,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    MASK: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SPLIT: gl.constexpr,
    BIASED: gl.constexpr,
    ORDERED: gl.constexpr,
):
    cfg = Config(D, KEYS, MASK, SOFTCAP, SPLIT, BIASED, ORDERED)
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    ticket = None
    turn = None
    added = None
    counted = None
    if ORDERED:
        ticket = take_ticket(counters_ptr, batch, heads, kv_heads, tiles, blocks, cfg)
        turn = gl.allocate_shared_memory(gl.int64, [1, 1], flags)
        added = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
        counted = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
        mbarrier.init(turn.index(0), count=1)
        for i in gl.static_range(2):
            mbarrier.init(added.index(i), count=2)
            mbarrier.init(counted.index(i), count=1)
    shape = Shape(
        bounds_ptr, extents_ptr, bias_ptr, bias_b, bias_h, batch, heads, kv_heads, q_len, kv_len, left, right, tiles,
        blocks, share, split, section, sections, ticket,
    )  # fmt: skip
    loads = Loads(q_desc, grad_out_desc, k_desc, v_desc, rows_desc, clean_q_desc, clean_grad_out_desc)
    results = Results(dk_desc, dv_desc, dq_sum_ptr, dkv_sum_ptr, counters_ptr, inner, scale, factor)
    # With wide heads each consumer writes half of the columns: a part of its own of shared memory.
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=64 if D > NARROW else 128, element_bitwidth=16, rank=2
    )
    p = None
    if D > NARROW:
        p = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, ROWS], ds_layout)
    pipe = Pipe(
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, ROWS, D], grad_out_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], rows_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], rows_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, KEYS, D], k_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, KEYS, D], v_desc.layout),
        p,
        gl.allocate_shared_memory(q_desc.dtype, [1 if D > NARROW else STAGES, KEYS, ROWS], ds_layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], flags),
        gl.allocate_shared_memory(gl.int64, [2, 1], flags),
        turn,
        added,
        counted,
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(pipe.q_full.index(i), count=1)
        mbarrier.init(pipe.grad_out_full.index(i), count=1)
        mbarrier.init(pipe.empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(pipe.keys_full.index(i), count=1)
    fence_async_shared()
    if ORDERED:
        gl.warp_specialize(
            [
                (_consume, (pipe, results, 0, shape, cfg)),
                (_consume, (pipe, results, 1, shape, cfg)),
                (produce, (loads, pipe, shape, cfg)),
                (give_turns, (pipe, results, shape, cfg)),
                (count_turns, (pipe, results, shape, cfg)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (pipe, results, 0, shape, cfg)),
                (_consume, (pipe, results, 1, shape, cfg)),
                (produce, (loads, pipe, shape, cfg)),
            ],
            [4, 1],
            [240, 24],
        )
