"""Tensors as the copy engine reads and writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....shape_cache import shape_cache
from ... import layout
from ...layout import ALIGNMENT, copied
from ..arguments import broadcast_strides
from ..cuda_driver import Description, describe, describe_flat, moved
from .binary import ROWS, Flags


def readable(x: Tensor) -> bool:
    """True when the copy engine can read or write `x` `[B, H, S, D]` (2 bytes an element) where it lies."""
    return not x.data_ptr() % ALIGNMENT and fits(x)


def fits(x: Tensor) -> bool:
    """True when the strides of `x` allow that, wherever it lies: 16-byte pieces, and nothing that was expanded."""
    return layout.fits(x) and not any(n > 1 and not s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def brought(x: Tensor) -> Tensor:
    """`x`, or a copy of it that the copy engine can read."""
    return x if readable(x) else copied(x)


class Layout:
    """What descriptions of tensors have in common that differ in their addresses alone: see `cuda_driver.describe`."""

    __slots__ = ("_first", "columns", "dtype", "rows", "shape", "strides", "together")

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        rows: int,
        columns: int = 0,
        together: int = 1,
    ) -> None:
        self.shape, self.strides, self.dtype, self.rows, self.columns = shape, strides, dtype, rows, columns
        self.together = together
        self._first: Description | None = None  #: which the others are made from

    def describe(self, address: int) -> Description:
        """A tensor at that address, a multiple of 16."""
        key = address, self
        found: Description | None = _descriptions.get(key)
        if found is None:
            found = _descriptions[key] = self._described(address)
        return found

    def _described(self, address: int) -> Description:
        if self._first is not None:
            return moved(self._first, address)
        made = describe(address, self.shape, self.strides, self.dtype, self.rows, self.columns, self.together)
        self._first = made
        return made


#: By address, and a `Layout` or what takes its place: one that was seen before costs one look.
_descriptions = shape_cache.section("tensor descriptions", 1 << 12)
_layouts = shape_cache.section("tensor descriptions", 1 << 12)
#: What is known under such a key, or None: for who would rather call `Layout.describe` for new ones alone.
known: Callable[[tuple[int, Any]], Description | None] = _descriptions.get


def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, rows: int, columns: int = 0, together: int = 1
) -> Layout:
    """One and the same for the same values."""
    key = tuple(shape), strides, dtype, rows, columns, together
    found: Layout | None = _layouts.get(key)
    if found is None:
        found = _layouts[key] = Layout(*key)
    return found


def describe_row(address: int, count: int, columns: int) -> Description:
    """Of `count` float32 numbers in a row, in boxes of `columns`."""
    key = address, (count, columns)
    found: Description | None = _descriptions.get(key)
    if found is None:
        found = _descriptions[key] = describe_flat(address, count, columns)
    return found


def tiles_readable(mask: Tensor) -> bool:
    """True when the strides of a mask `[B|1, H|1, Sq, Skv]` let the copy engine read its tiles, wherever it lies."""
    step = ALIGNMENT // mask.element_size()
    if mask.shape[3] == 1 or mask.stride(3) != 1 or mask.stride(2) < mask.shape[3]:
        return False
    return not any(stride % step for stride in broadcast_strides(mask, 4)[:3])


def once(mask: Any) -> Tensor:
    """The mask with one batch entry, or head, where it was expanded along them."""
    for dim in (0, 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask  # type: ignore[no-any-return]


def describe_mask(mask: Any, flags: Flags) -> tuple[Tensor, Description]:
    """The mask, or a copy that begins where the copy engine can read, and its description."""
    mask = once(mask)
    if mask.data_ptr() % ALIGNMENT:
        mask = torch.empty_strided(mask.shape, mask.stride(), dtype=mask.dtype, device=mask.device).copy_(mask)
    layout = layout_of(mask.shape, mask.stride(), flags.tiles, ROWS, flags.blocks.keys)
    return mask, layout.describe(mask.data_ptr())
