"""Rows of two parts (`tile_parts.py`) in Triton kernels: loads, the product of two, stores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, at, wanted, DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Both parts of the rows that begin at `ptr + at` [N]: [N, FIRST] and [N, REST]. Rows that are not wanted and
    columns from DIM on hold 0. Where REST is 0 the second part is the first again, so that there is something to pass
    on: `dot_rows` and `store_rows` leave it alone."""
    columns = tl.arange(0, FIRST)
    seen = wanted[:, None]
    if FIRST > DIM:
        seen = seen & (columns < DIM)[None, :]
    first = tl.load(ptr + at[:, None] + columns[None, :], mask=seen, other=0.0)
    rest = first
    if REST > 0:
        columns = FIRST + tl.arange(0, REST)
        seen = wanted[:, None]
        if FIRST + REST > DIM:
            seen = seen & (columns < DIM)[None, :]
        rest = tl.load(ptr + at[:, None] + columns[None, :], mask=seen, other=0.0)
    return first, rest


@triton.jit
def dot_rows(a, a_rest, b, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T in float32, of rows in two parts: [M, N]. PRECISION: of float32 products."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision=PRECISION)
    return product


@triton.jit
def store_rows(ptr, at, wanted, x, x_rest, DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Stores both parts, in ptr's dtype, to the rows that begin at `ptr + at` [N], those that are wanted."""
    columns = tl.arange(0, FIRST)
    seen = wanted[:, None]
    if FIRST > DIM:
        seen = seen & (columns < DIM)[None, :]
    tl.store(ptr + at[:, None] + columns[None, :], x.to(ptr.dtype.element_ty), mask=seen)
    if REST > 0:
        columns = FIRST + tl.arange(0, REST)
        seen = wanted[:, None]
        if FIRST + REST > DIM:
            seen = seen & (columns < DIM)[None, :]
        tl.store(ptr + at[:, None] + columns[None, :], x_rest.to(ptr.dtype.element_ty), mask=seen)
