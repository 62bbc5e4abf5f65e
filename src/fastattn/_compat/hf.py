"""What `fastattn.hf` is built on: transformers' interfaces for masks and caches. Imports transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .transformers import CACHE_ARGUMENTS
from .versions import need


def _need(name: str) -> Any:
    return need("transformers", f"transformers.{name}")


ALL_ATTENTION_FUNCTIONS = _need("modeling_utils.ALL_ATTENTION_FUNCTIONS")
Cache = _need("cache_utils.Cache")
CacheLayerMixin = _need("cache_utils.CacheLayerMixin")
StaticCache = _need("cache_utils.StaticCache")
causal_mask_function = _need("masking_utils.causal_mask_function")
sdpa_mask = _need("masking_utils.sdpa_mask")
is_tracing = _need("utils.import_utils.is_tracing")


def layer_without_memory() -> Any:
    """The cache of a layer that keeps nothing. Raises Gone before the versions that have such layers."""
    return _need("cache_utils.DummyLayer")()


def causal_mask(config: Any, batch: int, queries: int, cache: Any) -> Any:
    """The mask that a model's forward gets from transformers for so many new tokens of each row after a cache."""
    create = _need("masking_utils.create_causal_mask")
    name = next(name for name in CACHE_ARGUMENTS if name in inspect.signature(create).parameters)
    embeddings = torch.empty(batch, queries, 1, device="cpu")
    return create(config=config, inputs_embeds=embeddings, attention_mask=None, **{name: cache})
