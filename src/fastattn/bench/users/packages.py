"""The calls of packages other than torch: one thin adapter each, which raises `Refusal` for what it does not cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import peer_mlx, peers
from ..implementations import Refusal
from ..layouts import token_major
from .calls import FP32, Row, Tensors

Call = Callable[[], Any]

# --- MLX, which measures itself in a process of its own


def measured_by_mlx(row: Row, x: Tensors, sets: int) -> tuple[Tensor, dict[str, float]]:
    """MLX's output, and its microseconds: see `peer_mlx.measure`. Raises `Refusal`."""
    given = row.theirs(x)
    if row.training or row.softcap is not None or row.return_lse:
        raise Refusal("MLX is called without gradients, softcap and log-sum-exp")
    mask: Tensor | str | None = None
    if row.causal and row.sizes[3] > 1 and not (row.window or row.lengths or row.left_padded or row.packed):
        mask = "causal"  # to the lower right, as here
    elif given is None:
        mask = row.visible(x)[:, None]
    elif "attn_mask" in given:
        mask = given["attn_mask"]
    return peer_mlx.measure(x.q, x.k, x.v, mask, x.sinks, 1.0 / math.sqrt(row.sizes[5]), sets)


# --- other packages


def _flash_attn(row: Row, x: Tensors) -> Call:
    if row.sinks or row.mask is not None or row.left_padded or row.as_mask:
        raise Refusal("flash-attn 2 has no sinks, no tensor masks and no left padding")
    if row.dtype == FP32 or max(row.sizes[5:]) > 256:
        raise Refusal("flash-attn 2 has 16-bit dtypes and head dims up to 256")
    package = import_module("flash_attn")
    options: dict[str, Any] = {"causal": row.causal, "window_size": row.window or (-1, -1)}
    if row.softcap is not None:
        options["softcap"] = row.softcap
    if row.lengths:
        if row.training:
            raise Refusal("lengths on the device: without gradients")
        call = package.flash_attn_with_kvcache
        return lambda: call(*token_major(x), cache_seqlens=x.lengths, **options).transpose(1, 2)
    return peers.flash(package, x, longest(x), options)


def _flash_attn_4(row: Row, x: Tensors) -> Call:
    if row.mask is not None or row.left_padded or row.lengths or row.dtype == FP32:
        raise Refusal("flash-attn 4 is called without tensor masks, left padding, lengths on the device and fp32")
    package = import_module("flash_attn.cute")
    options: dict[str, Any] = {"causal": row.causal}
    if row.window is not None:
        options["window_size"] = tuple(None if n < 0 else n for n in row.window)
    if row.softcap is not None:
        options["softcap"] = row.softcap
    if x.sinks is not None:
        options["learnable_sink"] = x.sinks
    return peers.flash(package, x, longest(x), options)


def _flashinfer(row: Row, x: Tensors) -> Call:
    """Plans are made before: a model makes them for all of its layers."""
    if row.training:
        raise Refusal("FlashInfer computes no gradients")
    if row.sinks or row.mask is not None or row.left_padded or row.as_mask or row.dtype == FP32 or row.shared:
        raise Refusal("FlashInfer is called without sinks, tensor masks, left padding, fp32 and absorbed values")
    package = import_module("flashinfer")
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = row.sizes
    left, right = row.window or (-1, -1)
    kinds = {"q_data_type": x.q.dtype, "kv_data_type": x.k.dtype, "window_left": left, "logits_soft_cap": row.softcap}
    causal = row.causal or right == 0
    if q_len == 1 and row.cached and dim == value_dim:
        return peers.flashinfer_decode(package, x, kinds)
    if row.lengths:
        raise Refusal("FlashInfer's prefill reads lengths on the host")
    starts, keys = x.starts, x.starts
    if starts is None:
        starts, keys = (
            torch.arange(batch + 1, dtype=torch.int32, device=x.q.device) * length for length in (q_len, kv_len)
        )
    prefill = package.BatchPrefillWithRaggedKVCacheWrapper(peers.flashinfer_memory(x.q.device), "NHD")
    prefill.plan(starts, keys, heads, kv_heads, dim, head_dim_vo=value_dim, causal=causal, **kinds)
    q, k, v = (t.flatten(0, 1) for t in token_major(x))
    return lambda: prefill.run(q, k, v).unflatten(0, (batch, q_len)).transpose(1, 2)


def _xformers(row: Row, x: Tensors) -> Call:
    if row.sinks or row.softcap is not None or row.lengths or row.left_padded:
        raise Refusal("xFormers is called without sinks, softcap, lengths and left padding")
    if row.group > 1 and row.training:
        raise Refusal("xFormers has no gradients of grouped heads")
    attend = import_module("xformers.ops").memory_efficient_attention
    kinds = import_module("xformers.ops.fmha.attn_bias")
    mask: Any = None
    if x.mask is not None:
        if x.mask.dtype == torch.bool or row.group > 1:
            raise Refusal("xFormers has additive masks alone, and none for grouped heads")
        batch, heads, _, q_len, kv_len, *_ = row.sizes
        mask = x.mask.expand(batch, heads, q_len, kv_len)
    elif row.packed and x.starts is not None:
        mask = kinds.BlockDiagonalCausalMask.from_seqlens(x.starts.diff().tolist())
    elif row.window is not None:
        mask = kinds.LowerTriangularFromBottomRightLocalAttentionMask(row.window[0] + 1)
    elif row.causal and row.sizes[3] > 1:
        mask = kinds.LowerTriangularFromBottomRightMask()
    return partial(peers.xformers, attend, x, mask)


def longest(x: Tensors) -> int:
    """Of the packed sequences; 0 without."""
    return 0 if x.starts is None else int(x.starts.diff().max())


BINDERS: dict[str, Callable[[Row, Tensors], Call]] = {
    "flash-attn": _flash_attn,
    "flash-attn-4": _flash_attn_4,
    "flashinfer": _flashinfer,
    "xformers": _xformers,
}
