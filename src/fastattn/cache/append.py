"""The kernel that stores new keys and values in a cache, at positions that only the device knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backends.triton.launcher import Launcher, launcher_for


def append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor, ring: bool) -> None:
    """Stores the first `counts[b]` of the new tokens of row b as its last ones: one launch for keys and values.

    keys, values: the cache, `[B,Hkv,C,D]` and `[B,Hkv,C,Dv]`, last stride 1. k, v: `[B,Hkv,S,D]`, `[B,Hkv,S,Dv]`, the
    cache's dtype. lengths: int32 `[B]`, tokens including the new ones. counts: int32 `[B]`. ring: token t lies at
    t % C, and the last C remain; else it lies at t, and those beyond C are dropped.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    launcher_for(_launcher, (keys, values, k, v), ring)((keys, values, k, v, lengths, counts))


def _launcher(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, ring: bool) -> Launcher:
    batch, heads, new, dim = k.shape
    value_dim = v.shape[3]
    block_d = triton.next_power_of_2(max(dim, value_dim))
    block = max(1, min(triton.next_power_of_2(new), 4096 // block_d))
    return Launcher(
        _append,
        (batch * heads, -(-new // block)),
        k.device,
        (heads, new, keys.shape[2], dim, value_dim, *(s for x in (keys, values, k, v) for s in x.stride()[:3])),
        (ring, block, block_d),
        num_warps=4,
    )


@triton.jit(do_not_specialize=list(range(6, 6 + 5 + 12)))
def _append(  # type: ignore[no-untyped-def]
    keys, values, k, v, lengths, counts, heads, new, capacity, dim, value_dim,
    ck_b, ck_h, ck_t, cv_b, cv_h, cv_t, k_b, k_h, k_t, v_b, v_h, v_t,
    RING: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.minimum(tl.maximum(tl.load(counts + b), 0), new)
    token = tl.load(lengths + b) - count + i
    there = (i < count) & (token >= 0)
    if RING:
        there = there & (i >= count - capacity)  # what would be overwritten by a later one
        position = token % capacity
    else:
        there = there & (token < capacity)
        position = token
    d = tl.arange(0, BLOCK_D)
    i64, position64 = i.to(tl.int64), position.to(tl.int64)
    mask = there[:, None] & (d < dim)[None, :]
    x = tl.load(k + b * k_b + head * k_h + i64[:, None] * k_t + d[None, :], mask=mask)
    tl.store(keys + b * ck_b + head * ck_h + position64[:, None] * ck_t + d[None, :], x, mask=mask)
    mask = there[:, None] & (d < value_dim)[None, :]
    x = tl.load(v + b * v_b + head * v_h + i64[:, None] * v_t + d[None, :], mask=mask)
    tl.store(values + b * cv_b + head * cv_h + position64[:, None] * cv_t + d[None, :], x, mask=mask)
