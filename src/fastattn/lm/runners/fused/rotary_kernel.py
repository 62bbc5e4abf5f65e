"""Triton kernel between the QKV GEMM and attention: norms of the heads, rotary positions, the write to the KV cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "capacity", "k_sb", "k_sh", "k_sj", "v_sb", "v_sh", "v_sj"])
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
    BLOCK_HALF: tl.constexpr,
    UNIT: tl.constexpr,  # elements per unit of the strides: with 8, Triton knows that 16 bytes can be moved at once
    PDL: tl.constexpr,
):
    """Each program takes BLOCK_H heads of one token. Tokens beyond the capacity of the cache are dropped."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    t = tl.program_id(0)
    row = t // tokens
    position = tl.load(lengths_ptr + row) + t % tokens
    index = tl.minimum(position, capacity - 1)
    stored = tl.where(position < capacity, KV_HEADS, 0)
    t64, row64, index64 = t.to(tl.int64), row.to(tl.int64), index.to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_HALF)  # an entry is rotated together with the one half a head further on
    in_half = (d < HALF)[None, :]
    at = head[:, None] * D + d[None, :]
    inside = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & in_half
    x_ptr += t64 * ((Q_HEADS + 2 * KV_HEADS) * D)
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    is_q = (head < Q_HEADS)[:, None]
    if q_gain_ptr is not None:
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        rotated = (head < Q_HEADS + KV_HEADS)[:, None]  # values have no norm
        a = tl.where(rotated, a * factor * _gain(q_gain_ptr, k_gain_ptr, d, is_q, in_half), a)
        b = tl.where(rotated, b * factor * _gain(q_gain_ptr + HALF, k_gain_ptr + HALF, d, is_q, in_half), b)
    angle = index64 * D + d[None, :]
    cos_a = tl.load(cos_ptr + angle, mask=in_half, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + angle, mask=in_half, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + angle + HALF, mask=in_half, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + angle + HALF, mask=in_half, other=0.0).to(tl.float32)
    rotated_a = (a * cos_a - b * sin_a).to(q_ptr.dtype.element_ty)
    rotated_b = (b * cos_b + a * sin_b).to(q_ptr.dtype.element_ty)
    q_at = t64 * (Q_HEADS * D) + at
    tl.store(q_ptr + q_at, rotated_a, mask=is_q & in_half)
    tl.store(q_ptr + q_at + HALF, rotated_b, mask=is_q & in_half)
    k_head = head - Q_HEADS
    is_k = ((k_head >= 0) & (k_head < stored))[:, None] & in_half
    k_at = (row64 * k_sb + k_head.to(tl.int64)[:, None] * k_sh + index64 * k_sj) * UNIT + d[None, :]
    tl.store(k_ptr + k_at, rotated_a, mask=is_k)
    tl.store(k_ptr + k_at + HALF, rotated_b, mask=is_k)
    v_head = k_head - KV_HEADS
    is_v = ((v_head >= 0) & (v_head < stored))[:, None] & in_half
    v_at = (row64 * v_sb + v_head.to(tl.int64)[:, None] * v_sh + index64 * v_sj) * UNIT + d[None, :]
    tl.store(v_ptr + v_at, a.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_ptr + v_at + HALF, b.to(v_ptr.dtype.element_ty), mask=is_v)


@triton.jit
def _gain(q_gain_ptr, k_gain_ptr, d, is_q, in_half):
    q_gain = tl.load(q_gain_ptr + d[None, :], mask=in_half, other=0.0).to(tl.float32)
    k_gain = tl.load(k_gain_ptr + d[None, :], mask=in_half, other=0.0).to(tl.float32)
    return tl.where(is_q, q_gain, k_gain)
