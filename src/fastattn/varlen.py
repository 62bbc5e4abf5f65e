"""Packed sequences of different lengths, `[T,H,D]` with cumulative lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ._compat import torch as torch_internals
from .api import scaled_dot_product_attention
from .common.checks import check_flag
from .masks import Segments, packed_table, packed_view
from .validation import check_tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of N sequences that lie end to end: sequence n of q attends to sequence n of k and v.

    Args:
        q, k, v: `[Tq, Hq, D]`, `[Tkv, Hkv, D]`, `[Tkv, Hkv, Dv]`.
        cu_seqlens_q, cu_seqlens_kv: int32 `[N + 1]` on q's device: sequence n holds the tokens
            `cu[n] <= t < cu[n + 1]`. Never read on the host. Pass the same tensor object for both if queries and keys
            are the same tokens: that is faster. Tokens past the last entry belong to no sequence; their output is 0.
        causal: aligned to the lower right of each sequence, as in `scaled_dot_product_attention`.
        scale, sinks, window, softcap, backend: as in `scaled_dot_product_attention`; the window counts positions
            within the sequence.
        return_lse: also return the log-sum-exp, `[Hq, Tq]`.

    Returns:
        `[Tq, Hq, Dv]`, contiguous; with return_lse a pair.

    Raises:
        ValueError, TypeError: as `scaled_dot_product_attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dims [tokens, heads, dim], got {list(x.shape)}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if cu is cu_seqlens_q and name == "cu_seqlens_kv":
            break  # (looked at already)
        check_tensor(name, cu)
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name}: expected int32 [sequences + 1], got {cu.dtype} {list(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as of q, got {cu.device}")
    if cu_seqlens_q.shape != cu_seqlens_kv.shape:
        raise ValueError(
            f"cu_seqlens_kv: expected {list(cu_seqlens_q.shape)} as of cu_seqlens_q, got {list(cu_seqlens_kv.shape)}"
        )
    same = cu_seqlens_q is cu_seqlens_kv and q.shape[0] == k.shape[0]
    # Where nobody watches views are made past the dispatcher, and nothing outlives the call.
    recorded = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or getattr(sinks, "requires_grad", False)
    )
    given = (q, k, v, cu_seqlens_q, cu_seqlens_kv) if sinks is None else (q, k, v, cu_seqlens_q, cu_seqlens_kv, sinks)
    quick = not recorded and torch_internals.unrecorded(*given)
    if quick and same and not cu_seqlens_q.data_ptr() % 16:  # (kernels are compiled for such addresses first)
        table = packed_view(cu_seqlens_q)
    else:
        table = packed_table(cu_seqlens_q, None if same else cu_seqlens_kv)
    view = _heads_first if quick else _heads_first_of_graph
    result = scaled_dot_product_attention(
        view(q),
        view(k),
        view(v),
        scale=scale,
        mask=Segments(table, check_flag("causal", causal)),
        window=window,
        sinks=sinks,
        softcap=softcap,
        return_lse=return_lse,
        backend=backend,
    )
    if isinstance(result, tuple):
        return _tokens_first(result[0], quick), result[1].squeeze(0)
    return _tokens_first(result, quick)


def _heads_first(x: Tensor) -> Tensor:
    """`[T, H, D]` as `[1, H, T, D]`."""
    tokens, heads, dim = x.shape
    t, h, d = x.stride()
    return torch_internals.strided_view(x, (1, heads, tokens, dim), (tokens * t, h, t, d), 0)


def _heads_first_of_graph(x: Tensor) -> Tensor:
    """The same by operators whose gradients are views."""
    return x.unsqueeze(0).transpose(1, 2)


def _tokens_first(x: Tensor, quick: bool) -> Tensor:
    """`[1, H, T, D]` as `[T, H, D]`."""
    if not quick:
        return x.transpose(1, 2).squeeze(0)  # (the gradient of an index would be a copy)
    _, heads, tokens, dim = x.shape
    _, h, t, d = x.stride()
    return torch_internals.strided_view(x, (tokens, heads, dim), (t, h, d), 0)
