"""`flash_attn_varlen_func`, and the same of packed tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.checks import check_flag
from ...masks import Segments
from . import alibi
from .arguments import (
    Options,
    check_dims,
    check_dropout,
    check_hints,
    check_ints,
    check_length,
    check_packed,
    options,
    refuse,
)
from .attend import attend, attend_with_lengths, check_dropout_alone, returned, run
from .padding import packed, padded, paged

NAMES = ("q", "k", "v")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
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
        q: `[Tq, Hq, D]`. k, v: `[Tk, Hkv, D]`, `[Tk, Hkv, Dv]`; with a block_table `[pages, page size, Hkv, D]`, and
            the same with Dv.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]` on q's device: sequence n holds the tokens `cu[n] <= t < cu[n + 1]`.
            Never read on the host. Pass one tensor object for both where queries and keys are the same tokens: that
            is faster.
        max_seqlen_q, max_seqlen_k: not needed, and not read, unless there are alibi_slopes or a block_table: then
            sequences become a padded batch `[N, max_seqlen, H, D]`, by a copy. An int, or a tensor that holds one.
        block_table: int32 `[N, M]`: the page of each M-th part of a sequence's keys; their number is what cu_seqlens_k
            or seqused_k says. Pages of any size. No kernel reads pages in place: they are copied.
        seqused_q, seqused_k: int32 `[N]`: so many tokens of each sequence alone are there. The output of the other
            queries is 0.
        the others: as in `flash_attn_func`; windows and ALiBi count positions within a sequence. ALiBi's mask has
            `N * Hq * max_seqlen_k` numbers or `N * Hq * max_seqlen_q * max_seqlen_k`. Dropout without these two makes a
            dense mask of Tq x Tk.

    Returns:
        `[Tq, Hq, Dv]`, contiguous; 0 for queries that see nothing or are in no sequence. softmax_lse is float32
        `[Hq, Tq]`. Gradients, and what return_attn_probs and return_lse add: as in `flash_attn_func`.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
    """
    check_dims("tokens, heads, dim", q=q)
    check_dims("tokens, heads, dim" if block_table is None else "pages, page size, heads, dim", k=k, v=v)
    refuse(attention_chunk=attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    check_hints(num_splits, pack_gqa, sm_margin)
    chosen = options(softmax_scale, causal, window_size, softcap, learnable_sink)
    probability = check_dropout(dropout_p)
    probs = check_flag("return_attn_probs", return_attn_probs)
    check_dropout_alone(probability, chosen, probs, check_flag("return_lse", return_lse))
    check_dims("sequences + 1", cu_seqlens_q=cu_seqlens_q)
    count = max(cu_seqlens_q.shape[0] - 1, 0)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_ints(name, cu, (count + 1,), q)
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            check_ints(name, used, (count,), q)
    if alibi_slopes is not None:
        alibi.check_slopes(alibi_slopes, count, q)
    if block_table is not None:
        check_dims("sequences, pages", block_table=block_table)
        check_ints("block_table", block_table, (count, block_table.shape[1]), q)
    want_lse = probs or return_lse
    in_pages = block_table is not None and seqused_k is not None
    sequences = Sequences(cu_seqlens_q, None if in_pages and count else cu_seqlens_k, seqused_q, seqused_k)

    def side_by_side(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if block_table is not None:  # of no sequences
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        shared, mask = chosen._replace(sinks=sinks), sequences.segments(q.shape[0], k.shape[0])
        out, lse = attend(q[None], k[None], v[None], shared, dropout_p=probability, mask=mask, return_lse=want_lse)
        return out[0], None if lse is None else lse[0]

    def as_batch(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        longest_k = check_length("max_seqlen_k", max_seqlen_k)
        if block_table is None:
            k, v = padded(k, cu_seqlens_k, longest_k), padded(v, cu_seqlens_k, longest_k)
        else:
            pages = -(-longest_k // max(k.shape[1], 1))
            k, v = paged(k, block_table, pages), paged(v, block_table, pages)
        shared = chosen._replace(sinks=sinks)
        return attend_packed_queries(
            q, k, v, shared, sequences, check_length("max_seqlen_q", max_seqlen_q), slopes, probability, want_lse
        )

    batched = count > 0 and (alibi_slopes is not None or block_table is not None)
    compute = as_batch if batched else side_by_side
    out, lse = run(compute, deterministic, NAMES, q, k, v, alibi_slopes, learnable_sink)
    return returned(out, lse, probs, return_lse)


class Sequences:
    """Where the sequences of queries and of keys begin, and how many tokens of each are there."""

    def __init__(
        self, cu_q: Tensor, cu_k: Tensor | None, used_q: Tensor | None = None, used_k: Tensor | None = None
    ) -> None:
        """cu_k: None where the keys are a batch and used_k alone says how many there are."""
        self.cu_q, self.cu_k, self.used_q, self.used_k = cu_q, cu_k, used_q, used_k

    def segments(self, q_total: int, k_total: int) -> Segments:
        """For queries and keys that lie side by side in one batch entry."""
        assert self.cu_k is not None
        if self.used_q is None and self.used_k is None:
            same = self.cu_q is self.cu_k and q_total == k_total
            return Segments.packed(self.cu_q, None if same else self.cu_k)
        q_first, q_end = self.cu_q[:-1], self.cu_q[1:]
        k_first, k_end = self.cu_k[:-1], self.cu_k[1:]
        if self.used_q is not None:
            q_end = torch.minimum(q_end, q_first + self.used_q)
        if self.used_k is not None:
            k_end = torch.minimum(k_end, k_first + self.used_k)
        return Segments(torch.stack([torch.zeros_like(q_first), q_first, q_end, k_first, k_end]))

    @property
    def q_lengths(self) -> Tensor:
        """int32 `[N]`."""
        return _lengths(self.cu_q, self.used_q)

    @property
    def kv_lengths(self) -> Tensor:
        """int32 `[N]`."""
        if self.cu_k is None:
            assert self.used_k is not None
            return self.used_k
        return _lengths(self.cu_k, self.used_k)


def _lengths(cu: Tensor, used: Tensor | None) -> Tensor:
    whole = cu[1:] - cu[:-1]
    return whole if used is None else torch.minimum(whole, used)


def attend_packed_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: Options,
    sequences: Sequences,
    longest_q: int,
    slopes: Tensor | None,
    dropout_p: float,
    return_lse: bool,
    leftpad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed queries `[Tq, Hq, D]` over keys and values `[N, S, Hkv, D]`, of which each sequence has its
    first ones, without `leftpad` of them. Returns the output `[Tq, Hq, Dv]` and the log-sum-exp `[Hq, Tq]`."""
    batch = padded(q, sequences.cu_q, max(longest_q, 1))
    out, lse = attend_with_lengths(
        batch,
        k,
        v,
        shared,
        q_lengths=sequences.q_lengths,
        kv_lengths=sequences.kv_lengths,
        slopes=slopes,
        leftpad=leftpad,
        dropout_p=dropout_p,
        return_lse=return_lse,
    )
    return packed(out, lse, sequences.cu_q, q.shape[0])


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *arguments: Any, **options: Any) -> Any:
    """`flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], ...)`. kv: `[Tk, 2, Hkv, D]`; the gradient is one tensor."""
    check_packed("kv", kv, 2, "tokens, 2, heads, dim")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *arguments, **options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *arguments: Any, **options: Any
) -> Any:
    """`flash_attn_varlen_func` of `qkv.unbind(1)`, queries and keys of the same sequences. qkv: `[T, 3, H, D]`; the
    gradient is one tensor."""
    check_packed("qkv", qkv, 3, "tokens, 3, heads, dim")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *arguments, **options)
