"""Packed sequences as a padded batch, and back: for what packed ones cannot be combined with."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[T, H, D]` -> `[N, longest, H, D]`, by a copy. What lies past a sequence's end is another's, to be excluded by
    lengths. cu_seqlens: int32 `[N + 1]`; never read on the host."""
    if not x.shape[0]:  # a token of nobody, so that there is one to take
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    token = cu_seqlens[:-1, None] + torch.arange(longest, dtype=torch.int32, device=x.device)
    return x[token.clamp(0, x.shape[0] - 1)]


def packed(out: Tensor, lse: Tensor | None, cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor | None]:
    """`[N, longest, H, D]` and `[N, H, longest]` -> `[total, H, D]` and `[H, total]`. Tokens of no sequence get 0 and
    -inf."""
    token = torch.arange(total, dtype=torch.int32, device=out.device)
    count, longest = out.shape[:2]
    n = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    row = n.clamp(max=count - 1)
    i = (token - cu_seqlens[row]).clamp(0, longest - 1)
    nobody = (n == count) | (token < cu_seqlens[0])
    found = out[row, i].masked_fill(nobody[:, None, None], 0)
    if lse is None:
        return found, None
    return found, lse[row, :, i].masked_fill(nobody[:, None], -torch.inf).T.contiguous()


def paged(cache: Tensor, block_table: Tensor, pages: int | None = None) -> Tensor:
    """A paged cache `[pages, page size, H, D]` as `[B, tokens, H, D]`, by a copy.

    block_table: int32 `[B, M]`, the page of each row's tokens in order. pages: the first ones alone, where no row has
    more. Numbers that are no page's, in entries that no row uses, are as good as any.
    """
    table = block_table if pages is None else block_table[:, :pages]
    return cache[table.clamp(0, cache.shape[0] - 1)].flatten(1, 2)
