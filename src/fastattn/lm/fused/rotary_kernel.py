"""Between a layer's first product and its attention, in one kernel: norms of the heads, rotary positions, the cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "x_stride", "capacity", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"])
def rotary_kernel(
    x_ptr,  # [rows * tokens, (Hq + 2 Hkv) D]: queries, keys, values
    q_ptr,  # [rows * tokens, Hq D]: the rotated queries
    k_ptr,  # the cache [rows, Hkv, capacity, D]
    v_ptr,
    cos_ptr,  # [positions, D]
    sin_ptr,
    lengths_ptr,  # int32 [rows]: tokens of each row before these
    q_gain_ptr,  # [D] or None
    k_gain_ptr,
    tokens,  # of each row
    x_stride,
    capacity,
    k_sb,
    k_sh,
    k_sj,
    v_sb,
    v_sh,
    v_sj,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program takes BLOCK_H heads of one token. What has no room in the cache is dropped."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    row = t // tokens
    position = tl.load(lengths_ptr + row) + t % tokens
    place = tl.minimum(position, capacity - 1)
    stored = tl.where(position < capacity, KV_HEADS, 0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    across = tl.where(d < D // 2, d + D // 2, d - D // 2)  # what a number is rotated with
    base = t.to(tl.int64) * x_stride
    inside = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + base + head[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + base + head[:, None] * D + across[None, :], mask=inside, other=0.0).to(tl.float32)
    is_q = head < Q_HEADS
    if q_gain_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        q_gain = tl.load(q_gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        k_gain = tl.load(k_gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        q_gain_across = tl.load(q_gain_ptr + across, mask=d < D, other=0.0).to(tl.float32)
        k_gain_across = tl.load(k_gain_ptr + across, mask=d < D, other=0.0).to(tl.float32)
        rotated = head < Q_HEADS + KV_HEADS  # values have no norm
        gain = tl.where(is_q[:, None], q_gain[None, :], k_gain[None, :])
        gain_across = tl.where(is_q[:, None], q_gain_across[None, :], k_gain_across[None, :])
        x = tl.where(rotated[:, None], x * factor * gain, x)
        other = tl.where(rotated[:, None], other * factor * gain_across, other)
    cos = tl.load(cos_ptr + place.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + place.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    turned = x * cos[None, :] + tl.where(d < D // 2, -other, other) * sin[None, :]
    q_at = t.to(tl.int64) * (Q_HEADS * D) + head[:, None] * D + d[None, :]
    tl.store(q_ptr + q_at, turned.to(q_ptr.dtype.element_ty), mask=inside & is_q[:, None])
    row64, place64 = row.to(tl.int64), place.to(tl.int64)
    k_head = head - Q_HEADS
    is_k = (k_head >= 0) & (k_head < stored)
    k_at = row64 * k_sb + k_head.to(tl.int64)[:, None] * k_sh + place64 * k_sj + d[None, :]
    tl.store(k_ptr + k_at, turned.to(k_ptr.dtype.element_ty), mask=is_k[:, None] & (d < D)[None, :])
    v_head = k_head - KV_HEADS
    is_v = (v_head >= 0) & (v_head < stored)
    v_at = row64 * v_sb + v_head.to(tl.int64)[:, None] * v_sh + place64 * v_sj + d[None, :]
    tl.store(v_ptr + v_at, x.to(v_ptr.dtype.element_ty), mask=is_v[:, None] & (d < D)[None, :])
