"""What a call with a tensor for a mask needs to know of it, in one pass over it.

cuDNN adds a bias to the scores. To make it, and to find what it hides (queries that see nothing and keys that nobody
sees, whose contents must not reach the output) takes torch a dozen passes over tensors as large as the mask: a call
with an additive mask of 2048 x 2048 takes 326 us with them and 279 with this kernel (H100; torch's cuDNN alone: 204).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call import Call
from ...masks import LOWEST
from ..triton.launcher import Launcher, launcher_for
from ..triton.masking import visible_keys

BLOCK_ROWS = 16
BLOCK_KEYS = 256


def build_bias(c: Call, mask: Tensor, dtype: torch.dtype, merge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The bias, and what it and the band hide.

    Args:
        c: the call; its band and lengths count, Intervals and segments it has none.
        mask: its mask, `[B|1, Hq|1, Sq, Skv]`, bool or floating, any strides. Not float64.
        dtype: of the bias.
        merge: whether the bias also says what band and lengths hide.

    Returns:
        the bias `[B|1, Hq|1, Sq, Skv]`; which rows of it hide every key, bool `[B|1, Hq|1, Sq, 1]`; which keys some
        query sees, by mask, band and lengths, bool `[B|1, Hq|1, Skv]`.
    """
    q_len, kv_len = mask.shape[2:]
    lengths = [None if x is None else x.contiguous() for x in (c.q_lengths, c.kv_lengths)]
    batch = c.q.shape[0] if any(x is not None for x in lengths) else mask.shape[0]
    heads = mask.shape[1]
    added = mask.new_empty((batch, heads, q_len, kv_len), dtype=dtype)
    fully_masked = mask.new_empty((batch, heads, q_len, 1), dtype=torch.int8)
    seen = mask.new_zeros((batch, heads, kv_len), dtype=torch.int32)
    launch = launcher_for(_launcher, (mask, added, *lengths), c.left, c.right, merge)
    launch((mask, added, fully_masked, seen, *lengths))
    return added, fully_masked.view(torch.bool), seen.bool()


def _launcher(
    mask: Tensor, added: Tensor, q_lengths: Tensor | None, kv_lengths: Tensor | None, *options: int
) -> Launcher:
    left, right, merge = options
    batch, heads, q_len, kv_len = added.shape
    far = q_len + kv_len
    left, right = (far if side < 0 else min(side, far) for side in (left, right))
    outer, step = (mask.stride(0) if mask.shape[0] > 1 else 0, *mask.stride()[1:3]), mask.stride(3)
    # Strides known to be multiples of 8 let several keys be read and written at once.
    unit = 8 if step == 1 and not any(stride % 8 for stride in (*outer, kv_len)) else 1
    return Launcher(
        _build_bias,
        (triton.cdiv(q_len, BLOCK_ROWS), heads, batch),
        mask.device,
        (*(stride // unit for stride in outer), step, q_len, kv_len, kv_len // unit, left, right),
        (bool(merge), step == 1, unit, BLOCK_ROWS, BLOCK_KEYS, LOWEST),
        num_warps=4,
    )


_INTEGERS = ["mask_sb", "mask_sh", "mask_si", "mask_sj", "q_len", "kv_len", "added_si", "left", "right"]


@triton.jit(do_not_specialize=_INTEGERS)
def _build_bias(
    mask_ptr,
    added_ptr,  # [B, H, Sq, Skv]
    fully_masked_ptr,  # int8 [B, H, Sq]
    seen_ptr,  # int32 [B, H, Skv], zeros
    q_lengths_ptr,
    kv_lengths_ptr,
    mask_sb,
    mask_sh,
    mask_si,
    mask_sj,
    q_len,
    kv_len,
    added_si,
    left,
    right,
    MERGE: tl.constexpr,
    ADJACENT: tl.constexpr,  # mask_sj is 1
    UNIT: tl.constexpr,  # elements per unit of the other strides
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """Each program takes some rows of one head of the mask."""
    b = tl.program_id(2)
    plane = b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = i < q_len
    lo, hi = visible_keys(b, i, valid, None, None, q_lengths_ptr, kv_lengths_ptr, 0, 0, q_len, kv_len, left, right)
    mask_ptr += (b.to(tl.int64) * mask_sb + tl.program_id(1).to(tl.int64) * mask_sh) * UNIT
    added_ptr += plane * q_len * added_si * UNIT
    row = i.to(tl.int64)[:, None]
    mask_at, added_at = row * mask_si * UNIT, row * added_si * UNIT
    shown = tl.zeros([BLOCK_ROWS], tl.int32)  # whether the bias lets any key through
    for start in range(0, kv_len, BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        # kv_len, in a way that shows Triton what it is a multiple of: or no load is wider than a key.
        inside = valid[:, None] & (j < added_si * UNIT)[None, :]
        step = j if ADJACENT else j.to(tl.int64) * mask_sj
        value = tl.load(mask_ptr + mask_at + step[None, :], mask=inside, other=0)
        in_band = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if mask_ptr.dtype.element_ty == tl.int1:
            let_through = value != 0
            bias = tl.where(let_through, 0.0, float("-inf"))
        else:
            # What is finite stays so when cuDNN multiplies it by log2(e), also in a narrower dtype than the mask's.
            bias = value.to(tl.float32)
            let_through = bias > float("-inf")
            bias = tl.where(let_through & (bias < LOWEST), LOWEST, bias)
        let_through = let_through & in_band & inside
        if MERGE:
            bias = tl.where(let_through, bias, float("-inf"))
        tl.store(added_ptr + added_at + j[None, :], bias.to(added_ptr.dtype.element_ty), mask=inside)
        shown = tl.maximum(shown, tl.max((inside & (bias != float("-inf"))).to(tl.int32), 1))
        found = tl.max(let_through.to(tl.int32), 0)
        tl.atomic_max(seen_ptr + plane * kv_len + j, found, mask=(found > 0) & (j < kv_len), sem="relaxed")
    tl.store(fully_masked_ptr + plane * q_len + i, (1 - shown).to(tl.int8), mask=valid)
