"""Head dims that are no powers of two, as Triton's tiles have to be: a tile of two parts, each one wide.

576 is 512 + 64 and not 1024, 192 is 128 + 64, 96 is 64 + 32, 80 is 64 + 16, 72 is 64 + 16 of which 8 are padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_PART = 16  #: the least size of each dim of a tensor-core product in Triton


def parts(dim: int, least: int = MIN_PART) -> tuple[int, int]:
    """Columns of the first and the second part of tiles of `dim` columns; the second is 0 where one part is as good.

    Both are powers of two, at least `MIN_PART`, the second at least `least`, and hold at least `dim` together. Without
    a second part the first may hold padding, with one it holds none.
    """
    first, rest = 1 << (dim.bit_length() - 1), 0
    if dim > first:
        rest = max(least, _power(dim - first))
    whole = _power(dim)
    return (first, rest) if first >= MIN_PART and first + rest < whole else (whole, 0)


def _power(size: int) -> int:
    """The least power of two from `MIN_PART` on that is not below."""
    return max(MIN_PART, 1 << (size - 1).bit_length())


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
