"""What is done after the main kernel of the Hopper backward: sums of float32 become gradients. Plain Triton.

One program has a tile of 64 queries, or 64 keys of dK or dV where several programs shared a block. `sums.py` says how
the sums lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .prepare import hidden

FINISH_INTEGERS = ["batch", "heads", "kv_heads", "q_len", "kv_len", "tiles", "blocks", "dim8", "value8"]


@triton.jit(do_not_specialize=FINISH_INTEGERS)
def finish_kernel(
    dq_sum_ptr,  # float32 [B * Hq * tiles, 64 * DIM]
    dkv_sum_ptr,  # float32 [2, B * Hkv * blocks, KEYS * DIM], dV first; or None
    rows_ptr,  # float32 [B * Hq * tiles, 2, 64], see `prepare.py`; or None, where no query sees nothing
    dq_ptr,  # [B, Sq, Hq, D], contiguous
    dk_ptr,  # [B, Skv, Hkv, D]
    dv_ptr,
    batch,
    heads,
    kv_heads,
    q_len,
    kv_len,
    tiles,
    blocks,
    dim8,
    value8,
    factor,  # of dQ
    DIM: tl.constexpr,
    KEYS: tl.constexpr,  # of a block
):
    pid = tl.program_id(0)
    c = tl.arange(0, DIM)
    row = tl.arange(0, 64)
    of_queries = batch * heads * tiles
    if pid < of_queries:
        at = dq_sum_ptr + pid.to(tl.int64) * (64 * DIM) + tl.arange(0, 64 * DIM)
        if rows_ptr is None:
            x = tl.load(at) * factor
        else:
            # Of a tile without keys there is no sum.
            of_all = hidden(tl.load(rows_ptr + pid.to(tl.int64) * 128 + row)) + tl.zeros([64 * DIM], tl.int32)
            x = tl.load(at, mask=of_all == 0, other=0.0) * factor
        # Half of the dims, eight columns, warp, row, pair of columns, row + 8, column: see `sums.place`.
        x = tl.reshape(x.to(dq_ptr.dtype.element_ty), [2, DIM // 16, 4, 8, 4, 2, 2])
        x = tl.reshape(tl.permute(x, [2, 5, 3, 0, 1, 4, 6]), [64, DIM])
        bh = pid // tiles
        i = (pid - bh * tiles) * 64 + row
        b = bh // heads
        h = bh - b * heads
        at = ((b.to(tl.int64) * q_len + i) * heads + h) * (dim8 * 8)
        tl.store(dq_ptr + at[:, None] + c[None, :], x, mask=(i < q_len)[:, None] & (c < dim8 * 8)[None, :])
    elif dkv_sum_ptr is not None:
        part = pid - of_queries
        x = tl.load(dkv_sum_ptr + part.to(tl.int64) * (64 * DIM) + tl.arange(0, 64 * DIM))
        x = tl.reshape(x.to(dk_ptr.dtype.element_ty), [DIM // 8, 4, 8, 4, 2, 2])
        x = tl.reshape(tl.permute(x, [1, 4, 2, 0, 3, 5]), [64, DIM])
        block = part // (KEYS // 64)
        of_dv = batch * kv_heads * blocks
        is_dk = block >= of_dv
        block = tl.where(is_dk, block - of_dv, block)
        bh = block // blocks
        j = (block - bh * blocks) * KEYS + (part % (KEYS // 64)) * 64 + row
        b = bh // kv_heads
        h = bh - b * kv_heads
        at = (b.to(tl.int64) * kv_len + j) * kv_heads + h
        if is_dk:
            inside = (j < kv_len)[:, None] & (c < dim8 * 8)[None, :]
            tl.store(dk_ptr + (at * (dim8 * 8))[:, None] + c[None, :], x, mask=inside)
        else:
            inside = (j < kv_len)[:, None] & (c < value8 * 8)[None, :]
            tl.store(dv_ptr + (at * (value8 * 8))[:, None] + c[None, :], x, mask=inside)
