"""`flash_attn_with_kvcache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import debug
from ...common.checks import check_flag
from ...validation import FLOATING
from . import alibi
from .arguments import Options, check_dims, check_hints, check_ints, check_length, options, refuse
from .attend import attend_with_lengths, run
from .padding import paged
from .rotary import rotated
from .store import Places, store
from .varlen import Sequences, attend_packed_queries

NAMES = ("q", "k_cache", "v_cache")


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    attention_chunk: int = 0,
    cu_seqlens_k_new: None = None,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
) -> Any:
    """flash-attn's function of this name (2.8, and the later interfaces' arguments by keyword), through fastattn.

    Stores k and v in the cache, in place, and attends to what the cache holds then. It has no gradients: what it
    returns is not part of a graph, whatever q requires.

    Args:
        q: `[B, Sq, Hq, D]`; with cu_seqlens_q `[Tq, Hq, D]`.
        k_cache, v_cache: `[rows, C, Hkv, D]`, `[rows, C, Hkv, Dv]`, at least B rows, any strides; with a block_table
            `[pages, page size, Hkv, D]` and the same with Dv, pages of any size, and C stands for M pages.
        k, v: `[B, new, Hkv, D]`, `[B, new, Hkv, Dv]`, cast to the cache's dtype: token i of row b is stored at position
            `cache_seqlens[b] + i`. Both or neither; with cache_seqlens alone. Tokens beyond C are dropped where
            cache_seqlens is a tensor, which is never read on the host (FASTATTN_DEBUG=1 raises).
        rotary_cos, rotary_sin: `[R, rotary dim / 2]`, R at least C: k is rotated by the rows cache_seqlens,
            cache_seqlens + 1, ..., and so is q where the call is causal or has a window; else all of q is rotated by
            the row cache_seqlens. Together, and with k.
        cache_seqlens: tokens in the cache before the call: an int for all rows, or int32 `[B]` on q's device. None: C.
        cache_batch_idx: int32 `[B]`: the row of the cache that belongs to each row of q. Not with a block_table. Those
            rows are copied to be read; numbers that are no row's are clamped.
        cache_leftpad: int32 `[B]`: keys at the beginning of each row that nobody sees.
        block_table: int32 `[B, M]`, page_table in later interfaces: the pages of each row, in order. No kernel reads
            pages in place: they are copied for the call, all M of them, or as many as an int cache_seqlens needs.
        causal, window_size: query i of row b is at position i + n - Sq; n: cache_seqlens[b] with the new tokens.
        softmax_scale, softcap, alibi_slopes, learnable_sink: as in `flash_attn_func`. ALiBi's mask has `B * Hq * C`
            numbers, or `B * Hq * Sq * C`.
        rotary_interleaved: the pairs are the numbers 2i and 2i + 1; else i and i + rotary dim / 2.
        cu_seqlens_q: int32 `[B + 1]`: row b has the queries `cu[b] <= t < cu[b + 1]`, at most max_seqlen_q of them,
            which become a padded batch by a copy. Not with k.
        rotary_seqlens: int32 `[B]`: rotation begins at these rows rather than at cache_seqlens.
        num_splits, pack_gqa, sm_margin, scheduler_metadata: how a kernel is launched is fastattn's choice.
        attention_chunk, cu_seqlens_k_new, qv, q_descale, k_descale, v_descale: refused where they are given.

    Returns:
        `[B, Sq, Hq, Dv]`, contiguous; with return_softmax_lse also the log-sum-exp, float32 `[B, Hq, Sq]`. With
        cu_seqlens_q `[Tq, Hq, Dv]` and `[Hq, Tq]`.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
    """
    refuse(
        attention_chunk=attention_chunk,
        cu_seqlens_k_new=cu_seqlens_k_new,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    check_hints(num_splits, pack_gqa, sm_margin)
    chosen = options(softmax_scale, causal, window_size, softcap, learnable_sink)
    check_flag("return_softmax_lse", return_softmax_lse)
    check_dims("tokens, heads, dim" if cu_seqlens_q is not None else "batch, length, heads, dim", q=q)
    table = _one_table(block_table, page_table)
    dims = "rows, length, heads, dim" if table is None else "pages, page size, heads, dim"
    check_dims(dims, k_cache=k_cache, v_cache=v_cache)
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        before = list(k_cache.shape[:-1])
        raise ValueError(f"v_cache: expected {before} before its last dim, as k_cache has, got {list(v_cache.shape)}")
    batch = q.shape[0]
    if cu_seqlens_q is not None:
        check_dims("rows + 1", cu_seqlens_q=cu_seqlens_q)
        batch = max(cu_seqlens_q.shape[0] - 1, 0)
        check_ints("cu_seqlens_q", cu_seqlens_q, (batch + 1,), q)
        if k is not None:
            raise ValueError("cu_seqlens_q: expected None together with k: store k and v in the cache before the call")
    if table is not None:
        check_dims("rows, pages", block_table=table)
        check_ints("block_table", table, (batch, table.shape[1]), q)
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: expected None together with a block_table, which says it already")
    for name, x in (
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
        ("rotary_seqlens", rotary_seqlens),
    ):
        if x is not None:
            check_ints(name, x, (batch,), q)
    if cache_batch_idx is None and table is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: expected at least {batch} rows, as many as q has, got {k_cache.shape[0]}")
    if alibi_slopes is not None:
        alibi.check_slopes(alibi_slopes, batch, q)
    if cache_batch_idx is not None:
        cache_batch_idx = cache_batch_idx.clamp(0, max(k_cache.shape[0] - 1, 0))

    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    new = _new_tokens(k, v, q, k_cache, v_cache, cache_seqlens)
    held, lengths = _held(cache_seqlens, batch, new, capacity, q)
    q, k = _rotated(
        q,
        k,
        rotary_cos,
        rotary_sin,
        rotary_seqlens,
        held,
        capacity,
        chosen,
        check_flag("rotary_interleaved", rotary_interleaved),
    )
    if k is not None and v is not None and held is not None:
        store(k_cache, v_cache, k, v, Places(held, cache_batch_idx, table))

    known = cache_seqlens + new if isinstance(cache_seqlens, int) else None
    keys, values = (_rows(x, batch, cache_batch_idx, table, known) for x in (k_cache, v_cache))
    if known is not None and q.dim() == 4 and q.shape[1] > 1:
        # The host knows the lengths: a slice has none. (One query: each step would be another kind of call.)
        keys, values, lengths = keys[:, :known], values[:, :known], None

    def compute(
        q: Tensor, keys: Tensor, values: Tensor, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        shared = chosen._replace(sinks=sinks)
        if cu_seqlens_q is None:
            return attend_with_lengths(
                q,
                keys,
                values,
                shared,
                q_lengths=None,
                kv_lengths=lengths,
                slopes=slopes,
                leftpad=cache_leftpad,
                return_lse=return_softmax_lse,
            )
        longest = check_length("max_seqlen_q", max_seqlen_q)
        there = torch.full_like(cu_seqlens_q[1:], capacity) if lengths is None else lengths
        sequences = Sequences(cu_seqlens_q, None, None, there)
        return attend_packed_queries(
            q, keys, values, shared, sequences, longest, slopes, 0.0, return_softmax_lse, cache_leftpad
        )

    out, lse = run(compute, False, NAMES, q, keys, values, alibi_slopes, learnable_sink)
    return (out, lse) if return_softmax_lse else out


def _one_table(block_table: Tensor | None, page_table: Tensor | None) -> Tensor | None:
    if block_table is not None and page_table is not None:
        raise ValueError("page_table: expected None together with block_table, which is the same")
    return page_table if block_table is None else block_table


def _new_tokens(k: Any, v: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any) -> int:
    """How many tokens k and v hold, 0 without. Raises ValueError where they do not fit q and the cache."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing}: expected a tensor together with {given}, got None")
    check_dims("batch, length, heads, dim", k=k, v=v)
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected an int or a tensor together with k, which is stored behind, got None")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = [q.shape[0], k.shape[1], *cache.shape[2:]]
        if list(x.shape) != expected:
            raise ValueError(f"{name}: expected {expected} for this q and this cache, got {list(x.shape)}")
        if x.dtype not in FLOATING or x.device != cache.device:
            raise ValueError(f"{name}: expected a floating dtype on {cache.device}, got {x.dtype} on {x.device}")
    return k.shape[1]  # type: ignore[no-any-return]


def _held(cache_seqlens: Any, batch: int, new: int, capacity: int, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """int32 `[B]`: tokens of each row before the call, and with the new ones; None where a row is full of tokens."""
    if cache_seqlens is None:
        return None, None
    longest = None
    if isinstance(cache_seqlens, Tensor):
        check_ints("cache_seqlens", cache_seqlens, (batch,), q)
        held = cache_seqlens
        if debug.ENABLED and batch:
            longest = int(held.max())
    else:
        longest = check_length("cache_seqlens", cache_seqlens)
        held = torch.full((batch,), longest, dtype=torch.int32, device=q.device)
    if longest is not None and longest + new > capacity:
        raise ValueError(
            f"cache_seqlens: expected at most {capacity} tokens, the length of the cache, "
            f"got {longest} and {new} new ones"
        )
    return held, held + new if new else held


def _rows(cache: Tensor, batch: int, rows: Tensor | None, table: Tensor | None, known: int | None) -> Tensor:
    """What each row of q may see of a cache, `[B, tokens, Hkv, D]`: a view, or a copy where rows or pages lie apart.

    known: tokens of every row, where the host knows it.
    """
    if table is not None:
        return paged(cache, table, None if known is None else -(-known // max(cache.shape[1], 1)))
    if rows is None:
        return cache[:batch]
    return (cache if known is None else cache[:, :known]).index_select(0, rows)


def _rotated(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    held: Tensor | None,
    capacity: int,
    chosen: Options,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """q and k with the rotary embedding, if there is one. Raises ValueError where its tables do not fit."""
    if cos is None or sin is None:
        for name, x, other in (("rotary_cos", cos, "rotary_sin"), ("rotary_sin", sin, "rotary_cos")):
            if x is not None:
                raise ValueError(f"{other}: expected a tensor together with {name}, got None")
        return q, k
    if k is None or held is None:
        raise ValueError("rotary_cos: expected None without k: what the cache holds is rotated already")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_dims("rows, rotary dim / 2", **{name: x})
        if x.shape != cos.shape or x.shape[0] < capacity or 2 * x.shape[1] > q.shape[-1]:
            raise ValueError(
                f"{name}: expected at least {capacity} rows of at most {q.shape[-1] // 2} numbers, rotary_sin as "
                f"rotary_cos, got {list(x.shape)}"
            )
        if x.dtype not in FLOATING or x.device != q.device:
            raise ValueError(f"{name}: expected a floating dtype on {q.device}, got {x.dtype} on {x.device}")
    first = (held if rotary_seqlens is None else rotary_seqlens)[:, None]
    step = torch.arange(max(q.shape[1], k.shape[1]), dtype=torch.int32, device=q.device)
    # Without a causal mask or a window flash-attn takes all queries to be at the first new token's position.
    own = step[: q.shape[1]] if chosen.window is not None else torch.zeros_like(step[: q.shape[1]])
    return (
        rotated(q, cos, sin, first + own, interleaved),
        rotated(k, cos, sin, first + step[: k.shape[1]], interleaved),
    )
