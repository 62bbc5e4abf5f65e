"""What a call *is*, apart from its data: the types that pass between the rooms of the house.

`Call` carries one attention call with its tensors, in the order of the operator's schema (`ops.py`). `Problem` says
everything about it that is not data; backends accept or refuse by looking at the `Problem` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One validated attention call. Shapes as in `fastattn.scaled_dot_product_attention`.

    The causal mask and the window are one thing here, a band: a query at position p sees the keys
    `[p - left, p + right]`, -1 meaning open; "causal" is `right = 0`. With segments p is counted within the segment.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None  #: bool or additive, 4-D, every dim 1 or full
    lo: Tensor | None = None  #: int32 [B|1, Sq|1], first visible key
    hi: Tensor | None = None  #: int32 [B|1, Sq|1], one past the last visible key
    sinks: Tensor | None = None  #: [Hq]
    q_lengths: Tensor | None = None  #: int32 [B]
    kv_lengths: Tensor | None = None  #: int32 [B]
    segments: Tensor | None = None  #: int32 [3|5, N]: `masks.Segments.table`
    scale: float = 1.0
    left: int = -1
    right: int = -1
    softcap: float = 0.0  #: 0 = off
    return_lse: bool = False  #: the caller wants the log-sum-exp
    grads: str = ""  #: which inputs need a gradient, a subset of "qkvms" (m: mask, s: sinks) in this order


class Gradients(NamedTuple):
    """Gradients of a `Call`'s inputs; None where none was asked for. `mask` and `sinks` have their input's shape."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A call without its data: shapes, dtypes, features, device. Hashable; never holds strides, scale or lengths."""

    device: str  #: torch device type
    index: int  #: device index, -1 on the CPU
    capability: tuple[int, int]  #: compute capability, (0, 0) without a GPU
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    mask: str  #: "none", "bool", "additive", "intervals" or "segments"
    mask_shape: tuple[int, ...]  #: of the tensor, broadcast dims 1; of lo for intervals; of the table for segments
    mask_dtype: torch.dtype | None
    left: int
    right: int
    softcap: float
    sinks: bool
    q_lengths: bool
    kv_lengths: bool
    return_lse: bool
    grads: str

    @property
    def group(self) -> int:
        """Query heads per K/V head."""
        return self.q_heads // self.kv_heads

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def banded(self) -> bool:
        return self.left >= 0 or self.right >= 0

    @property
    def dense_mask(self) -> bool:
        """True when the call holds a bool or additive tensor."""
        return self.mask in ("bool", "additive")

    @property
    def may_have_empty_rows(self) -> bool:
        """True unless shapes alone prove that every query sees a key. (Lengths and masks are data: they may not.)"""
        if self.mask != "none" or self.q_lengths or self.kv_lengths:
            return True
        # The first query stands at kv_len - q_len, the last at kv_len - 1.
        return (0 <= self.right < self.q_len - self.kv_len) or self.kv_len == 0

    @property
    def empty(self) -> bool:
        """True when there is nothing to compute: no query or no key."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.kv_len, self.head_dim, self.value_dim)

    @staticmethod
    def of(call: Call) -> Problem:
        q, k, v, mask, lo = call.q, call.k, call.v, call.mask, call.lo
        batch, q_heads, q_len, head_dim = q.shape
        kind: str = "none"
        shape: tuple[int, ...] = ()
        dtype = None
        if mask is not None:
            kind, shape, dtype = ("bool" if mask.dtype == torch.bool else "additive"), tuple(mask.shape), mask.dtype
        elif lo is not None:
            kind, shape, dtype = "intervals", tuple(lo.shape), lo.dtype
        elif call.segments is not None:
            kind, shape, dtype = "segments", tuple(call.segments.shape), call.segments.dtype
        device = q.device
        index = -1 if device.index is None else device.index
        return Problem(
            device=device.type,
            index=index,
            capability=_capability(index) if device.type == "cuda" else (0, 0),
            dtype=q.dtype,
            batch=batch,
            q_heads=q_heads,
            kv_heads=k.shape[1],
            q_len=q_len,
            kv_len=k.shape[2],
            head_dim=head_dim,
            value_dim=v.shape[3],
            mask=kind,
            mask_shape=shape,
            mask_dtype=dtype,
            left=call.left,
            right=call.right,
            softcap=call.softcap,
            sinks=call.sinks is not None,
            q_lengths=call.q_lengths is not None,
            kv_lengths=call.kv_lengths is not None,
            return_lse=call.return_lse,
            grads=call.grads,
        )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def token_major(
    like: Tensor, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised `[batch, heads, length, dim]` tensor whose memory runs `[batch, length, heads, dim]`.

    The one layout of every output and gradient: it is what a model's projections read and write, and, unlike a layout
    that follows the inputs', it is known when a graph is traced.
    """
    return like.new_empty((batch, length, heads, dim), dtype=dtype or like.dtype).transpose(1, 2)


def as_token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[B,H,S,D]` in that dtype and in the layout of every output and gradient."""
    batch, heads, length, dim = x.shape
    found = token_major(x, batch, heads, length, dim, dtype)
    return x if x.dtype == dtype and x.stride() == found.stride() else found.copy_(x)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, accumulation and log-sum-exp: float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
