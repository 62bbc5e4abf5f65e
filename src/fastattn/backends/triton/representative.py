"""A call that stands for all calls of a problem, where only the binaries that they need are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call, Problem, token_major


def stand_in(dtype: torch.dtype) -> Tensor:
    """For a tensor that a launch makes itself: nothing of it is looked at but the dtype, and that it is aligned."""
    return torch.empty(0, dtype=dtype, device="meta")


def representative(p: Problem) -> Call:
    """A call of the problem on the meta device: token-major, and aligned as torch allocates."""
    like = stand_in(p.dtype)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    intervals, segments = p.mask == "intervals", p.mask == "segments"
    return Call(
        q=token_major(like, p.batch, p.q_heads, p.q_len, p.head_dim),
        k=token_major(like, p.batch, p.kv_heads, p.kv_len, p.head_dim),
        v=token_major(like, p.batch, p.kv_heads, p.kv_len, p.value_dim),
        mask=torch.empty(p.mask_shape, dtype=p.mask_dtype, device="meta") if p.dense_mask else None,
        lo=ints(*p.mask_shape) if intervals else None,
        hi=ints(*p.mask_shape) if intervals else None,
        sinks=like.new_empty(p.q_heads) if p.sinks else None,
        q_lengths=ints(p.batch) if p.q_lengths else None,
        kv_lengths=ints(p.batch) if p.kv_lengths else None,
        segments=ints(*p.mask_shape) if segments else None,
        left=p.left,
        right=p.right,
        softcap=p.softcap,
        return_lse=p.return_lse,
        grads=p.grads,
    )
