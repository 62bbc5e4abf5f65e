"""Sums of partial results, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "pieces"])
def sum_kernel(pieces_ptr, out_ptr, count, pieces, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """float32 [pieces, count] summed over the pieces, always in the same order, into out_ptr's dtype."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, STEP):
        piece = start + tl.arange(0, STEP)
        at = piece.to(tl.int64)[:, None] * count + n[None, :]
        total += tl.sum(tl.load(pieces_ptr + at, mask=(piece < pieces)[:, None] & (n < count)[None, :], other=0.0), 0)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < count)
