"""The attention function: what a transformers layer says about a call, in the op's terms.

The mask says which keys the queries see. Only a layer that is given none, because no mask function was asked, is
described by its own `is_causal`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import masks
from ..._compat.hf import ALL_ATTENTION_FUNCTIONS
from ..._compat.transformers import PAGED_ARGUMENTS
from ...api import scaled_dot_product_attention
from ...common.notice import warn_once
from ...masks import Intervals
from ...validation import Arguments, Mask, validated
from ...varlen import varlen_attention
from .lazy_mask import Band, CausalSegments, LazyMask, LiveKeys, capturing, compact_of, dense_intervals
from .mask import asks_for_masks

#: Arguments that change what a layer computes and that the op does not know: to leave one out would be silently wrong.
REFUSED = {
    "block_indices": "sparse attention over chosen blocks of keys",
    "sinks": "sinks that differ between tokens",
    **dict.fromkeys(PAGED_ARGUMENTS, "the paged cache of continuous batching"),
}

#: Windows that are no windows, and the mask that says the same.
OPEN_LEFT: dict[tuple[int, int] | None, Mask] = {(-1, 0): "causal", (-1, -1): None}


class MaskArguments(NamedTuple):
    """Which keys the queries see: the op's `mask`, `window` and `kv_lengths`, over the first `keys` keys."""

    mask: Mask
    window: tuple[int, int] | None
    keys: int
    lengths: Tensor | None = None


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' `AttentionInterface` asks for it.

    Args:
        module: the layer; its `is_causal` is read where there is no mask, unless masks are made for its `config`: None
            means every key then.
        query, key, value: `[B, Hq, Sq, D]`, `[B, Hkv, Skv, D]`, `[B, Hkv, Skv, Dv]`; keys and values not repeated. A
            batch of 1 broadcasts.
        attention_mask: None, what `interval_mask` made, or a bool (True = attend) or additive tensor broadcastable to
            `[B, Hq, Sq, >= Skv]`. A tensor is the whole truth; only None leaves causality and window to
            `is_causal` and `sliding_window`. Causal is aligned to the lower right.
        dropout: of the probabilities. fastattn has none: such a call runs on transformers' "sdpa", which cannot do
            sinks or softcap.
        scaling: factor on the scores, default `1 / sqrt(D)`.
        sliding_window: a causal query sees this many keys, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`; None or 0 = off.
        s_aux: sinks `[Hq]`.
        position_bias: added to the scores, broadcastable to `[B, Hq, Sq, >= Skv]`.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, int `[N + 1]`: with no mask, the tokens of the batch, row after
            row, are N packed sequences. `indices`, integer `[B, Sq, any]`: the only keys that each query sees. Others
            are ignored, or refused where that would be wrong.

    Returns:
        `[B, Sq, Hq, Dv]`, contiguous, and None for the probabilities, which are never computed as a whole.

    Raises:
        ValueError: dropout with sinks or softcap; an argument of `REFUSED`; what the op itself raises on.
    """
    for name in REFUSED.keys() & kwargs.keys():
        if kwargs[name] is not None:
            raise ValueError(
                f'attn_implementation="fastattn" cannot do {REFUSED[name]} (argument `{name}` of '
                f'{type(module).__name__}): load this model with "sdpa" or "eager"'
            )
    if kwargs.get("output_attentions"):
        warn_once('attn_implementation="fastattn" does not return attention weights: use "eager" to get them')
    if dropout and (s_aux is not None or softcap):
        raise ValueError(
            f'attn_implementation="fastattn": {type(module).__name__} asks for attention dropout together with '
            f'{"softcap" if softcap else "sinks"}: set attention_dropout=0 in its config, or use "eager"'
        )
    query, key, value = _one_batch(query, key, value)
    causal = attention_mask is None and _calls_itself_causal(module, is_causal)
    settings: dict[str, Any] = {"scale": scaling, "sinks": s_aux, "softcap": softcap or None}
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    packing = None if cu_q is None or cu_k is None else (cu_q, cu_k)
    indices = kwargs.get("indices")
    alone = not (packing or dropout) and indices is None and position_bias is None
    found = _mask_arguments(query.shape[2], key.shape[2], attention_mask, causal, sliding_window, alone)
    if packing:
        left, right = found.window or (-1, -1)
        banded = found.mask is None and found.keys == key.shape[2] and right <= 0
        if banded and position_bias is None and indices is None and not dropout:
            causal = right == 0 or causal
            window = (left, -1) if left >= 0 else None
            return _packed(query, key, value, *packing, causal=causal, window=window, **settings), None
        found = found._replace(mask=_meet(found.mask, _segments(query, key, *packing), found.keys))
    if indices is not None:
        warn_once(
            f'attn_implementation="fastattn": the sparse attention of {type(module).__name__} runs as full attention '
            "under a dense mask: the same result, not the same speed."
        )
        found = found._replace(mask=_meet(found.mask, _chosen(indices, found.keys), found.keys))
    if found.keys < key.shape[2]:
        key, value = key[:, :, : found.keys], value[:, :, : found.keys]
    if position_bias is not None:
        found = found._replace(mask=_biased(found.mask, position_bias[..., : found.keys]))
    if dropout:
        return _with_dropout(module, query, key, value, found, dropout, scaling), None
    mask, window = found.mask, found.window
    if found.lengths is not None:
        settings["kv_lengths"] = found.lengths
    if mask is None and window in OPEN_LEFT:  # the same, said with less to check
        mask, window = OPEN_LEFT[window], None
    out = scaled_dot_product_attention(query, key, value, mask=mask, window=window, **settings)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def _calls_itself_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Whether a layer that is handed no mask is causal.

    Eager attention sees every key then, whatever the layer says of itself, and so does a layer of a model that asks for
    its masks. Where none was asked for (layers that are called by themselves), the layer's word counts.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    return bool(causal) and not asks_for_masks(getattr(module, "config", None))


def _mask_arguments(
    q_len: int, kv_len: int, mask: Tensor | None, causal: bool, sliding_window: int | None, alone: bool
) -> MaskArguments:
    """alone: nothing else masks, so that the mask may stay what only the op knows."""
    if mask is None:
        if not causal:
            # The windows of encoders are in their masks; a bare `sliding_window` is counted differently by each.
            return MaskArguments(None, None, kv_len)
        left = sliding_window - 1 if sliding_window and kv_len > sliding_window else -1
        right = 0 if q_len > 1 else -1  # a single query stands on the last key
        return MaskArguments(None, (left, right), kv_len)
    compact = compact_of(mask)
    if compact is None:
        if not mask.dtype.is_floating_point and mask.dtype != torch.bool:
            raise ValueError(
                'attn_implementation="fastattn": expected attention_mask to be None, bool (True = attend) or additive '
                f"floating, got {mask.dtype} {list(mask.shape)}"
            )
        if isinstance(mask, LazyMask):  # autograd knows what was written into the mask, not the memory behind it
            mask = mask.clone() if mask.requires_grad else mask.dense()
        return MaskArguments(mask[..., :kv_len] if mask.shape[-1] > kv_len else mask, None, kv_len)
    visible, hint, captured = compact
    if isinstance(hint, LiveKeys) and alone:  # on the device: good in a graph as well
        seen = visible if isinstance(visible, Tensor) else None
        return MaskArguments(None if seen is None else seen[..., :kv_len], None, kv_len, hint.lengths)
    if captured or not capturing(mask):
        # Numbers of the host hold for this very mask; a graph may be replayed with others, unless it makes its own.
        if isinstance(hint, Band) and hint.keys <= kv_len:
            return MaskArguments(None, (hint.left, hint.right), hint.keys)
        if isinstance(hint, CausalSegments) and alone:
            return MaskArguments(hint.segments, (hint.left, -1), kv_len)
    if isinstance(visible, Tensor):
        visible = visible[..., :kv_len]
    return MaskArguments(visible, None, kv_len)


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of 1 broadcasts, as in eager attention."""
    batch = query.shape[0]
    if batch == key.shape[0] == value.shape[0]:
        return query, key, value
    batch = max(batch, key.shape[0], value.shape[0])
    query, key, value = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (query, key, value))
    return query, key, value


def _biased(mask: Mask, bias: Tensor) -> Tensor:
    """Bias and mask as one additive tensor."""
    if mask is None:
        return bias
    if isinstance(mask, Intervals):
        mask = dense_intervals(mask, bias.shape[-1])
    assert isinstance(mask, Tensor)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def _segments(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor) -> Intervals:
    """The packed sequence of each query, as an interval of its row's keys."""
    batch, _, q_len, _ = query.shape
    cu_q, cu_k = (cu.to(device=query.device, dtype=torch.int32) for cu in (cu_q, cu_k))
    table = masks.Segments.packed(cu_q, cu_k).table
    lo, hi = masks.segment_bounds(table, 1, batch * q_len, batch * key.shape[2])
    row = torch.arange(batch, device=query.device, dtype=torch.int32)[:, None] * key.shape[2]
    return Intervals(lo.view(batch, q_len) - row, hi.view(batch, q_len) - row)


def _chosen(indices: Tensor, keys: int) -> Tensor:
    """bool `[B, 1, Sq, keys]`: the keys that each query names in integer `[B, Sq, any]`; negative names none."""
    slots = torch.where(indices < 0, keys, indices).long()
    seen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool, device=indices.device)
    return seen.scatter(-1, slots, True)[:, None, :, :keys]


def _meet(mask: Mask, other: Intervals | Tensor, keys: int) -> Mask:
    """What both let see. other: Intervals or bool."""
    if mask is None:
        return other
    if isinstance(mask, Intervals):
        if isinstance(other, Intervals):
            return Intervals(torch.maximum(mask.lo, other.lo), torch.minimum(mask.hi, other.hi))
        mask = dense_intervals(mask, keys)
    assert isinstance(mask, Tensor)
    seen = dense_intervals(other, keys) if isinstance(other, Intervals) else other
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def _packed(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, **settings: Any) -> Tensor:
    """The rows of a batch, end to end, as packed sequences."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_q, cu_k = (cu.to(device=q.device, dtype=torch.int32) for cu in (cu_q, cu_k))
    out = varlen_attention(q, k, v, cu_q, cu_k, **settings)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _with_dropout(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: MaskArguments,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The same call on transformers' "sdpa", with a dense mask where it needs one."""
    warn_once(
        'attn_implementation="fastattn": attention dropout runs on transformers\' "sdpa", which makes a dense mask for '
        "padding, packing and windows. Set attention_dropout=0 in the model's config to train on fastattn."
    )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    left, right = found.window or (-1, -1)
    square = right < 0 or query.shape[2] == key.shape[2]
    if found.mask is None and left < 0 and right <= 0 and square:
        return sdpa(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=right == 0)[0]
    call = validated(Arguments(query, key, value, found.mask, window=found.window))
    seen = masks.visibility(call)
    assert seen is not None
    blind = ~seen.any(-1, keepdim=True)  # torch leaves open what such rows give
    mask = seen | blind
    if call.mask is not None and call.mask.dtype != torch.bool:
        mask = torch.where(mask, torch.where(blind, 0.0, call.mask), -torch.inf).to(query.dtype)
    out = sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False)[0]
    return out.masked_fill(blind.transpose(1, 2), 0)
