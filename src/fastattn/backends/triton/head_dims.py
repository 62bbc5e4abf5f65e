"""Loads, products and stores of tiles in two parts: see `tile_parts.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, at, wanted, DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Both parts of the rows that begin at `ptr + at` [N]: [N, FIRST] and [N, REST]. Rows that are not wanted
    (None: all are) and columns from DIM on hold 0. Where REST is 0 the second part is the first again, so that there is
    something to pass on: `dot_rows` and `store_rows` leave it alone."""
    first = _load(ptr, at, wanted, DIM, 0, FIRST)
    rest = first
    if REST > 0:
        rest = _load(ptr, at, wanted, DIM, FIRST, REST)
    return first, rest


@triton.jit
def _load(ptr, at, wanted, DIM: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    columns = START + tl.arange(0, SIZE)
    where = ptr + at[:, None] + columns[None, :]
    if START + SIZE > DIM:
        seen = (columns < DIM)[None, :]
        if wanted is not None:
            seen = seen & wanted[:, None]
        x = tl.load(where, mask=seen, other=0.0)
    elif wanted is not None:
        x = tl.load(where, mask=wanted[:, None], other=0.0)
    else:
        x = tl.load(where)
    return x


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
