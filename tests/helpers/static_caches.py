"""What the tests of transformers' static cache share."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fastattn._compat.transformers import with_cache
from fastattn.integrations.transformers import StaticCache

CAPACITY = 32


def make(model: PreTrainedModel, batch: int, capacity: int = CAPACITY) -> StaticCache:
    return StaticCache(model.config, batch=batch, capacity=capacity, device=model.device)


def poison(cache: StaticCache) -> None:
    """NaN at every position, used or not."""
    for memory in cache.memory:
        memory.keys.fill_(torch.nan)
        memory.values.fill_(torch.nan)


def step(model: PreTrainedModel, ids: Tensor, cache: StaticCache, **inputs: Tensor) -> Tensor:
    """Logits of a step, positions given by the cache."""
    with torch.no_grad():
        return model(ids, position_ids=cache.positions(ids.shape[1]), **with_cache(model, cache), **inputs).logits


def expected(family: str, ids: Tensor, **changes: Any) -> Tensor:
    """eager's logits of whole sequences, `[B, S, V]`."""
    model = build(family, "eager", **changes)
    with torch.no_grad():
        return model(ids, **with_cache(model, DynamicCache(config=model.config))).logits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
