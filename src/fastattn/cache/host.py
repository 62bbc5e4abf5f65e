"""What `append.py` does, with torch."""

from __future__ import annotations

import torch
from torch import Tensor


def append_on_the_host(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor, ring: bool
) -> None:
    """The same with torch, where there is no Triton. Waits for the device, if there is one."""
    new, capacity = k.shape[2], keys.shape[2]
    i = torch.arange(new, device=k.device)
    counts = counts.clamp(0, new).long()
    token = lengths.long()[:, None] - counts[:, None] + i
    there = (i < counts[:, None]) & (token >= 0)
    there &= (i >= counts[:, None] - capacity) if ring else (token < capacity)
    row, at = there.nonzero(as_tuple=True)
    place = token[row, at] % capacity if ring else token[row, at]
    keys[row, :, place] = k[row, :, at]
    values[row, :, place] = v[row, :, at]
