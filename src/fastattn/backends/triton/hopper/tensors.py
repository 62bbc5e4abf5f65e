"""Tensors as the copy engine reads and writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....shape_cache import shape_cache
from ...layout import copied
from ..arguments import broadcast_strides
from ..cuda_driver import Description, describe, describe_flat, make_current
from .binary import ROWS, Flags

ALIGNMENT = 16  #: bytes, of addresses and strides: the copy engine's


def readable(x: Tensor) -> bool:
    """True when the copy engine can read or write `x` `[B, H, S, D]` (2 bytes an element) where it lies."""
    step = ALIGNMENT // x.element_size()
    if x.data_ptr() % ALIGNMENT or (x.shape[3] > 1 and x.stride(3) != 1):
        return False
    return not any(n > 1 and (s % step or s < step) for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


#: Of readable tensors only: one that was seen before costs one look.
_descriptions = shape_cache.section("tensor descriptions", 1 << 12)


def described(x: Tensor, dtype: str, rows: int, columns: int = 0) -> tuple[Tensor, Description]:
    """`x`, or a copy of it that the copy engine can read, and its description for boxes of `rows` tokens. columns: see
    `cuda_driver.describe`."""
    found = _descriptions.get((x.data_ptr(), x.shape, x.stride(), dtype, rows, columns))
    if found is None:
        if not readable(x):
            x = copied(x)
        found = _description(x, dtype, rows, columns)
    return x, found


def _description(x: Tensor, dtype: str, rows: int, columns: int) -> Description:
    key = x.data_ptr(), x.shape, x.stride(), dtype, rows, columns
    found: Description | None = _descriptions.get(key)
    if found is None:
        _with_context(x)
        found = _descriptions[key] = describe(*key)
    return found


def _with_context(x: Tensor) -> None:
    """Describing needs one, and a thread may have none yet: autograd's, before anything ran in it."""
    if x.is_cuda:
        make_current(x.device.index)


def described_row(x: Tensor, columns: int) -> Description:
    """Of the float32 numbers of `x`, which lie in a row, in boxes of `columns`."""
    key = x.data_ptr(), x.numel(), columns
    found: Description | None = _descriptions.get(key)
    if found is None:
        _with_context(x)
        found = _descriptions[key] = describe_flat(*key)
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
    return mask, _description(mask, flags.tiles, ROWS, flags.blocks.keys)
