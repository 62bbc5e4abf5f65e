"""`flash_attn_func`, and the same of packed tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...common.checks import check_flag
from . import alibi
from .arguments import check_dims, check_dropout, check_hints, check_packed, options, refuse
from .attend import attend, check_dropout_alone, returned, run

NAMES = ("q", "k", "v")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
) -> Any:
    """flash-attn's function of this name (2.8, and the later interfaces' arguments by keyword), through fastattn.

    Args:
        q: `[B, Sq, Hq, D]`. k: `[B, Skv, Hkv, D]`, Hkv divides Hq. v: `[B, Skv, Hkv, Dv]`. Dtypes as in
            `fastattn.scaled_dot_product_attention`, any strides, any D.
        dropout_p: above 0 torch's kernels compute it, and its random numbers are torch's. What their causal flag
            cannot say needs a dense mask. Not with softcap, learnable_sink, or a log-sum-exp.
        softmax_scale: None for `1 / sqrt(D)`.
        causal: aligned to the lower right: query i sees key j when `j <= i + Skv - Sq`.
        window_size: `(left, right)`: query i sees the keys `[p - left, p + right]`, p = i + Skv - Sq; below 0 or None:
            open.
        softcap: above 0: scores become `softcap * tanh(score / softcap)`.
        alibi_slopes: floating `[Hq]` or `[B, Hq]`: adds `-slope * |i + Skv - Sq - j|` to the scores, after the
            softcap. It becomes an additive mask, made in each call, float32 (float64 for float64): `Hq * Skv` numbers
            where the call is causal or has one query, except for float32 inputs and beside a sink, else
            `Hq * Sq * Skv`; times B for `[B, Hq]`.
        deterministic: the backward runs with torch's deterministic algorithms. Under torch.compile call
            `torch.use_deterministic_algorithms(True)` instead.
        return_attn_probs: return `(out, softmax_lse, S_dmask)`; S_dmask is empty, as flash-attn's is without dropout.
        return_lse: return `(out, softmax_lse)`.
        learnable_sink: `[Hq]`: the op's `sinks`.
        num_splits, pack_gqa, sm_margin: checked; how a kernel is launched is fastattn's choice.
        attention_chunk, qv, q_descale, k_descale, v_descale: refused where they are given.

    Returns:
        `[B, Sq, Hq, Dv]`, contiguous; 0 in rows that see nothing. softmax_lse is float32 `[B, Hq, Sq]`, natural
        logarithm; -inf in rows that see nothing (flash-attn 2 gives inf, 3 gives -inf). Gradients exist for q, k, v,
        through softmax_lse as well, and for learnable_sink and alibi_slopes that require one.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
    """
    check_dims("batch, length, heads, dim", q=q, k=k, v=v)
    refuse(attention_chunk=attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    check_hints(num_splits, pack_gqa, sm_margin)
    chosen = options(softmax_scale, causal, window_size, softcap, learnable_sink)
    probability = check_dropout(dropout_p)
    probs = check_flag("return_attn_probs", return_attn_probs)
    check_dropout_alone(probability, chosen, probs, check_flag("return_lse", return_lse))
    if alibi_slopes is not None:
        alibi.check_slopes(alibi_slopes, q.shape[0], q)

    def compute(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        shared, bias = chosen._replace(sinks=sinks), None
        if slopes is not None:
            bias = alibi.bias(slopes, q.shape[1], k.shape[1], q.dtype, shared)
        return attend(q, k, v, shared, dropout_p=probability, bias=bias, return_lse=probs or return_lse)

    out, lse = run(compute, deterministic, NAMES, q, k, v, alibi_slopes, learnable_sink)
    return returned(out, lse, probs, return_lse)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *arguments: Any, **options: Any) -> Any:
    """`flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], ...)`. kv: `[B, Skv, 2, Hkv, D]`; the gradient is one tensor."""
    check_packed("kv", kv, 2, "batch, length, 2, heads, dim")
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *arguments, **options)


def flash_attn_qkvpacked_func(qkv: Tensor, *arguments: Any, **options: Any) -> Any:
    """`flash_attn_func` of `qkv.unbind(2)`. qkv: `[B, S, 3, H, D]`; the gradient is one tensor."""
    check_packed("qkv", qkv, 3, "batch, length, 3, heads, dim")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *arguments, **options)
