"""Dropout, by torch's kernels: fastattn's own have none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ... import masks
from ...validation import Arguments, validated


def attend(arguments: Arguments, scale: float | None, dropout_p: float) -> Tensor:
    """The op with dropout on the probabilities, `[B, Hq, Sq, Dv]`.

    Without softcap, sinks and log-sum-exp, which torch's kernels do not have. What their `is_causal` cannot say (causal
    with fewer or more queries than keys, windows, lengths, segments, biases) becomes a dense mask.
    """
    call = validated(arguments, scale)
    q, k, v = call.q, call.k, call.v
    square = q.shape[2] == k.shape[2]
    alone = all(x is None for x in (call.mask, call.lo, call.segments, call.q_lengths, call.kv_lengths))
    group = q.shape[1] > k.shape[1]
    if alone and call.left < 0 and (call.right < 0 or (call.right == 0 and square)) and k.shape[2]:
        causal = call.right == 0
        return functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal, scale=call.scale, enable_gqa=group
        )
    seen = masks.visibility(call)
    if seen is None:
        seen = torch.ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device)
    nothing = ~seen.any(-1, keepdim=True)  # such rows see everything, so that nothing is divided by 0; cleared below
    unseen = masks.unseen_keys(call)
    k, v, q = masks.clear(k, unseen), masks.clear(v, unseen), masks.clear(q, nothing)
    mask = seen | nothing
    if call.mask is not None and call.mask.is_floating_point():
        work = torch.promote_types(q.dtype, call.mask.dtype)
        q, k, v = q.to(work), k.to(work), v.to(work)
        mask = torch.where(mask, torch.where(nothing, 0.0, call.mask.to(work)), -torch.inf)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=call.scale, enable_gqa=group
    )
    return masks.clear(out.to(call.q.dtype), nothing)
