"""The second kernel of split-KV attention with wide heads: as `combine_kernel`, but nothing that it reads is waited for
before the rest is asked for.

A row of 512 values that 128 splits left is 256 KiB. `combine_kernel` takes it in four pieces of 128 columns, each in
four rounds of 32 splits after a look at which splits did anything: five waits for the L2 cache, one after another, on
32 of an H100's multiprocessors where there are 8 rows. Here there are more programs, of fewer columns, and each asks
for all that it has to read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import located, store_row


@triton.jit(do_not_specialize=["q_len", "splits"])
def combine_wide_kernel(
    scratch_ptr,  # as `combine_kernel`, all the arguments
    out_ptr,
    lse_ptr,
    sinks_ptr,
    q_len,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,  # columns of a program
    CHUNK: tl.constexpr,  # splits read at once: mostly all
    PDL: tl.constexpr,
):
    """Columns of one row of one tile, by a running softmax over chunks of splits."""
    b, i, head, part, every = located(splits, KV_HEADS, GROUP)
    count = tl.num_programs(1)
    dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_ptr = scratch_ptr + every * DV
    l_ptr = m_ptr + every
    if PDL:  # waits for the first kernel's end; then the one after this one may get ready, to wait for this one's end
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    m = float("-inf")
    l = 0.0
    if sinks_ptr is not None:  # a score whose value is 0
        m = tl.load(sinks_ptr + head).to(tl.float32)
        l = tl.where(m > float("-inf"), 1.0, 0.0)
    out = tl.zeros([BLOCK_DV], tl.float32)
    for begin in tl.range(0, splits, CHUNK, num_stages=1):
        c = begin + tl.arange(0, CHUNK)
        there = c < splits
        at = part + c * count
        acc = tl.load(scratch_ptr + at[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        # Without it ptxas has all wait for the scores before it asks for the last of the values.
        tl.debug_barrier()
        m_c = tl.load(m_ptr + at, mask=there, other=float("-inf"))
        l_c = tl.load(l_ptr + at, mask=there, other=0.0)
        m_new = tl.maximum(m, tl.max(m_c, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp(m_c - base)
        decay = tl.exp(m - base)
        m = m_new
        l = l * decay + tl.sum(weight * l_c, 0)
        # Where the row saw no key (l is 0; NaN where it saw a NaN) the split may have left what the memory held.
        out = out * decay + tl.sum(tl.where((l_c != 0.0)[:, None], weight[:, None] * acc, 0.0), 0)

    total = tl.where(l == 0.0, 1.0, l)
    store_row(out_ptr, lse_ptr, out, m, total, dv, b, i, head, q_len, KV_HEADS * GROUP, DV)
