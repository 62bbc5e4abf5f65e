"""Attention of other packages, compared with fastattn's where they are installed: one thin adapter for each package.

An adapter's `bind` raises `Refusal` for calls that its package cannot do or that the adapter does not cover. A package
that is not installed has no version in `present()`, and a report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..common.machine import version_of
from . import peer_mlx
from .case import Case
from .implementations import Implementation, Refusal, with_sinks
from .inputs import Inputs, document_of
from .layouts import Operands, first, from_packed, to_packed, token_major

Call = Callable[[], Tensor]


def present() -> dict[str, str | None]:
    """The peers by name, each with its version, or None when it is not installed."""
    return {
        name: torch.__version__ if peer.package is None else version_of(peer.package) for name, peer in PEERS.items()
    }


# --- torch's flex_attention


def forget_compiled() -> None:
    """Before each comparison: what flex compiled for others would count against how often it may compile."""
    torch.compiler.reset()


@cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention under torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # by default: a second length is compiled for any length


def _bind_flex(case: Case, x: Inputs) -> Call:
    """Its block mask is made before: a model makes one for all of its layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    if x.lengths is not None and case.q_len == 1:
        raise Refusal("a block mask of lengths on the device would have to be made anew for each token")
    offset, left, bias = case.kv_len - case.q_len, case.left, x.mask
    document = document_of(case, x.q.device) if case.packed else None
    first = None if case.padding is None else torch.tensor(case.padding, device=x.q.device)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + offset
        if left >= 0:
            seen = seen & (j >= i + offset - left)
        if document is not None:
            seen = seen & (document[i] == document[j])
        if first is not None:
            seen = seen & (j >= first[b])
        return seen

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert case.softcap is not None
        return case.softcap * torch.tanh(score / case.softcap)

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[0, 0, i, j]

    options: dict[str, Any] = {"enable_gqa": case.q_heads != case.kv_heads}
    if case.q_len > 1 or left >= 0:
        batch = case.batch if case.padding else None
        options["block_mask"] = create_block_mask(sees, batch, None, case.q_len, case.kv_len, device=x.q.device)
    if case.additive:
        options["score_mod"] = with_bias
    elif case.softcap:
        options["score_mod"] = capped
    if x.sinks is None:
        return partial(compiled_flex(), x.q, x.k, x.v, **options)
    return partial(flex_with_sinks, compiled_flex(), x.sinks, x.q, x.k, x.v, **options)


def flex_with_sinks(attend: Callable[..., Any], sinks: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
    """The log-sum-exp says how much the sinks take off."""
    out, lse = attend(*tensors, return_lse=True, **options)
    return with_sinks(out, lse, sinks)


# --- flash-attn and flash-attn-4


def _bind_flash_attn(case: Case, x: Inputs) -> Call:
    if case.sinks or case.additive or case.padding:
        raise Refusal("flash-attn 2 has no sinks, no additive masks and no left padding")
    package = import_module("flash_attn")
    window = (case.left, 0)
    if x.lengths is not None:
        options = {"cache_seqlens": x.lengths, "causal": True, "window_size": window}
        return lambda: package.flash_attn_with_kvcache(*token_major(x), **options).transpose(1, 2)
    return flash(package, x, _longest(case), {"causal": True, "window_size": window})


def _bind_flash_attn_4(case: Case, x: Inputs) -> Call:
    if case.additive or case.padding or case.lengths:
        raise Refusal("the adapter of flash-attn 4 covers no additive masks, left padding or lengths on the device")
    package = import_module("flash_attn.cute")
    options: dict[str, Any] = {"causal": True}
    if case.left >= 0:
        options["window_size"] = (case.left, 0)
    if x.sinks is not None:
        options["learnable_sink"] = x.sinks
    return flash(package, x, _longest(case), options)


def _longest(case: Case) -> int:
    return max(case.packed or (0,))


def flash(package: Any, x: Operands, longest: int, options: dict[str, Any]) -> Call:
    """Batches and packed sequences, as both packages take them; one of them returns the log-sum-exp as well.

    longest: of the packed sequences."""
    if x.starts is None:
        return lambda: first(package.flash_attn_func(*token_major(x), **options)).transpose(1, 2)
    sizes = {"cu_seqlens_q": x.starts, "cu_seqlens_k": x.starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return lambda: from_packed(first(package.flash_attn_varlen_func(*to_packed(x), **options, **sizes)))


# --- FlashInfer: inference only


def _bind_flashinfer(case: Case, x: Inputs) -> Call:
    if case.sinks or case.additive or case.padding:
        raise Refusal("the adapter of FlashInfer covers no sinks, additive masks or left padding")
    if x.q.requires_grad:
        raise Refusal("FlashInfer computes no gradients")
    flashinfer = import_module("flashinfer")

    heads = case.q_heads, case.kv_heads, case.dim
    kinds = {"q_data_type": x.q.dtype, "kv_data_type": x.k.dtype, "window_left": case.left}
    if case.packed:
        packed = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(flashinfer_memory(x.q.device), "NHD")
        packed.plan(x.starts, x.starts, *heads, causal=True, **kinds)
        return lambda: from_packed(packed.run(*to_packed(x)))
    if case.q_len == 1:
        return flashinfer_decode(flashinfer, x, kinds)
    if case.batch > 1:
        raise Refusal("the adapter of FlashInfer covers the prefill of one sequence only")
    prefill, window = flashinfer.single_prefill_with_kv_cache, case.left
    return lambda: from_packed(prefill(*to_packed(x), causal=True, kv_layout="NHD", window_left=window))


def flashinfer_decode(package: Any, x: Operands, kinds: dict[str, Any]) -> Call:
    """One query for each batch entry, whose keys are one page; kinds: of the plan's options."""
    batch, kv_heads, kv_len, dim = x.k.shape
    pages = torch.arange(batch + 1, dtype=torch.int32, device=x.q.device)
    last = torch.full_like(pages[1:], kv_len) if x.lengths is None else x.lengths
    decode = package.BatchDecodeWithPagedKVCacheWrapper(flashinfer_memory(x.q.device), "HND", use_tensor_cores=True)
    decode.plan(pages, pages[:-1], last, x.q.shape[1], kv_heads, dim, kv_len, **kinds)
    return lambda: decode.run(x.q[:, :, 0], (x.k, x.v))[:, :, None]


@cache
def flashinfer_memory(device: torch.device) -> Tensor:
    """What its plans work in: one a device."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


# --- xFormers


def _bind_xformers(case: Case, x: Inputs) -> Call:
    if case.sinks or case.additive or case.padding or case.lengths:
        raise Refusal("the adapter of xFormers covers no sinks, additive masks, left padding or lengths on the device")
    attend = import_module("xformers.ops").memory_efficient_attention
    attn_bias = import_module("xformers.ops.fmha.attn_bias")
    group = case.q_heads // case.kv_heads
    if group > 1 and x.q.requires_grad:
        raise Refusal("xFormers has no gradients of grouped heads")
    if case.packed:
        bias: Any = attn_bias.BlockDiagonalCausalMask.from_seqlens(list(case.packed))
    elif case.left >= 0:
        bias = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(case.left + 1)
    else:
        bias = attn_bias.LowerTriangularFromBottomRightMask() if case.q_len > 1 else None
    return partial(xformers, attend, x, bias)


def xformers(attend: Callable[..., Any], x: Operands, bias: Any) -> Tensor:
    """Its function; heads of a group are one more dim."""
    q, k, v = token_major(x)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        q = q.unflatten(2, (k.shape[2], group))
        k, v = (t[:, :, :, None].expand(-1, -1, -1, group, -1) for t in (k, v))
    out: Tensor = attend(q, k, v, attn_bias=bias)
    return (out.flatten(2, 3) if group > 1 else out).transpose(1, 2)


# --- MLX


def _bind_mlx(case: Case, x: Inputs) -> Call:
    raise Refusal("MLX is measured in a process of its own")


def _measure_mlx(case: Case, sets: Sequence[Inputs]) -> tuple[Tensor, dict[str, Any]]:
    if case.padding or case.packed or case.lengths or case.left >= 0 or case.softcap:
        raise Refusal("MLX has no softcap, and padding, packing, lengths and windows only as an array mask")
    x = sets[0]
    if x.q.requires_grad:
        raise Refusal("the adapter of MLX covers the forward only")
    mask: Tensor | str | None = x.mask if case.additive else ("causal" if case.q_len > 1 else None)
    out, times = peer_mlx.measure(x.q, x.k, x.v, mask, x.sinks, 1.0 / math.sqrt(case.dim), len(sets))
    return out, {**times, "method": "own process"}


PEERS = {
    peer.name: peer
    for peer in (
        Implementation("flex", _bind_flex, needs_cuda=True, softcap=True),
        Implementation("flash-attn", _bind_flash_attn, package="flash-attn", needs_cuda=True),
        Implementation("flash-attn-4", _bind_flash_attn_4, package="flash-attn-4", needs_cuda=True),
        Implementation("flashinfer", _bind_flashinfer, package="flashinfer-python", needs_cuda=True),
        Implementation("xformers", _bind_xformers, package="xformers", needs_cuda=True),
        Implementation("mlx", _bind_mlx, package="mlx", measure=_measure_mlx),
    )
}
