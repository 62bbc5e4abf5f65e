"""Tensors as the copy engine reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....shape_cache import cached
from ... import layout
from ...layout import ALIGNMENT, copied
from ..arguments import broadcast_strides
from ..cuda_driver import TensorMap, flat_tensor_map, tensor_map
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


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensors lie that share a tensor map but for its address: see `cuda_driver.tensor_map`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    rows: int
    columns: int = 0
    together: int = 1

    def map(self) -> TensorMap:
        return _tensor_map(self)


@dataclass(frozen=True, slots=True)
class Row:
    """The same of `count` float32 numbers in a row, in boxes of `columns`."""

    count: int
    columns: int

    def map(self) -> TensorMap:
        return _tensor_map(self)


@cached(1 << 12, "tensor maps")
def _tensor_map(x: Layout | Row) -> TensorMap:
    if isinstance(x, Row):
        return flat_tensor_map(x.count, x.columns)
    return tensor_map(x.shape, x.strides, x.dtype, x.rows, x.columns, x.together)


def layout_of(x: Tensor, dtype: str, rows: int, columns: int = 0, together: int = 1) -> Layout:
    """Of tensors that lie as `x`."""
    return Layout(tuple(x.shape), x.stride(), dtype, rows, columns, together)


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


def tiles_layout(mask: Any, flags: Flags) -> Layout:
    """Of a mask with rows, of which tiles are read."""
    return layout_of(once(mask), flags.tiles, ROWS, flags.blocks.keys)


def brought_mask(mask: Any) -> Tensor:
    """The mask `once`, or a copy that lies as it does and begins where the copy engine can read."""
    mask = once(mask)
    if mask.data_ptr() % ALIGNMENT:
        mask = torch.empty_strided(mask.shape, mask.stride(), dtype=mask.dtype, device=mask.device).copy_(mask)
    return mask  # type: ignore[no-any-return]
