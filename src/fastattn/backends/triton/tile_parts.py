"""Head dims that are no powers of two, as the sides of Triton's tiles have to be: two parts, each of which is one.

576 is 512 + 64 and not 1024, 192 is 128 + 64, 96 is 64 + 32, 80 is 64 + 16, 72 is 64 + 16 of which 8 are padding.
`head_dims.py` has what kernels do with them.
"""

from __future__ import annotations

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
