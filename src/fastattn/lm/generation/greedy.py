"""Prefill in steps and greedy decoding over a transformers cache, as a plain loop without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._compat.transformers import last_logits_only, with_cache
from ..runner import PREFILL_STEP


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, cache: Any, step: int = PREFILL_STEP) -> Tensor:
    """Fills the cache with a prompt and returns the first new tokens, the most likely ones.

    All tokens but the last go through the model's body in steps, without the head, because their logits are not needed.
    The last token then goes through the whole model.

    Args:
        model: a transformers model for causal language modelling.
        ids: int64 `[B, P]` on the model's device, B prompts of P >= 1 tokens each.
        cache: a transformers cache; empty, or with the tokens before the prompt.
        step: tokens per forward pass, >= 1.

    Returns:
        int64 `[B]`, on the device. The host does not wait for it.

    Raises:
        ValueError: ids or step is not as described.
    """
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"ids: expected [batch, tokens], at least one of each, got {list(ids.shape)}")
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    last = ids.shape[1] - 1
    body = model.base_model
    for start in range(0, last, step):
        body(input_ids=ids[:, start : min(start + step, last)], **with_cache(body, cache), use_cache=True)
    return _next_tokens(model, ids[:, last:], cache)


@torch.inference_mode()
def generate_tokens(model: Any, ids: Tensor, *, cache: Any = None, step: int = PREFILL_STEP) -> Iterator[Tensor]:
    """Continues prompts greedily for as long as the caller iterates; `itertools.islice` sets the number of tokens.

    Yields one int64 `[B]` per step, on the device. Work is only queued: a GPU runs behind the host until the caller
    reads a token or synchronises. No token ends a row; stop tokens are up to the caller.

    Args:
        model, ids, step: as in `prefill`.
        cache: default: a new DynamicCache, which grows by one token per step.
    """
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    token = prefill(model, ids, cache, step)
    while True:
        yield token
        token = _next_tokens(model, token[:, None], cache)


def _next_tokens(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The most likely token after ids `[B, n]`: int64 `[B]`. Computes logits of the last position only."""
    keep = last_logits_only(model)
    return model(input_ids=ids, **with_cache(model, cache), use_cache=True, **keep).logits[:, -1].argmax(-1)
