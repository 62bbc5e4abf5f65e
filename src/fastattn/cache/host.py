"""`append.append` in torch, for devices without Triton."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def append_on_the_host(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor, ring: bool
) -> None:
    """See `append.append`. Waits for the device, if there is one."""
    new, capacity = k.shape[2], keys.shape[2]
    i = torch.arange(new, device=k.device)
    counts = counts.clamp(0, new).long()
    token = lengths.long()[:, None] - counts[:, None] + i
    there = (i < counts[:, None]) & (token >= 0)
    there &= (i >= counts[:, None] - capacity) if ring else (token < capacity)
    row, at = there.nonzero(as_tuple=True)
    position = token[row, at] % capacity if ring else token[row, at]
    keys[row, :, position] = k[row, :, at]
    values[row, :, position] = v[row, :, at]
