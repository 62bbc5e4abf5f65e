"""What `fastattn.hf` is built on: transformers' masks and caches. Imports transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .versions import need


def _need(name: str) -> Any:
    return need("transformers", f"transformers.{name}")


ALL_ATTENTION_FUNCTIONS = _need("modeling_utils.ALL_ATTENTION_FUNCTIONS")
Cache = _need("cache_utils.Cache")
CacheLayerMixin = _need("cache_utils.CacheLayerMixin")
StaticCache = _need("cache_utils.StaticCache")
causal_mask_function = _need("masking_utils.causal_mask_function")
bidirectional_mask_function = _need("masking_utils.bidirectional_mask_function")
sdpa_mask = _need("masking_utils.sdpa_mask")
is_tracing = _need("utils.import_utils.is_tracing")


def layer_without_memory() -> Any:
    """The cache of a layer that keeps nothing. Raises Gone before the versions that have such layers."""
    return _need("cache_utils.DummyLayer")()


MASKING = causal_mask_function.__module__  #: where transformers' mask functions are written

#: What these functions are taken to mean, on two rows of six positions: by qualified name, how one is made and what it
#: says of (row, query, key). Only those that say so are recognised; a version that changed one is evaluated instead.
_IDS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]], device="cpu")
_PLACES = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]], device="cpu")
_PADDING = torch.tensor([0, 1], device="cpu")
_MEANINGS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    "causal_mask_function": (lambda m: m.causal_mask_function, lambda b, q, k: k <= q),
    "bidirectional_mask_function": (lambda m: m.bidirectional_mask_function, lambda b, q, k: (k == k) & (q == q)),
    "and_masks.<locals>.and_mask": (
        lambda m: m.and_masks(m.causal_mask_function, m.sliding_window_overlay(2)),
        lambda b, q, k: (k <= q) & (k > q - 2),
    ),
    "sliding_window_overlay.<locals>.inner_mask": (
        lambda m: m.sliding_window_overlay(2),
        lambda b, q, k: (k > q - 2) & (q == q),
    ),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": (
        lambda m: m.sliding_window_bidirectional_overlay(2),
        lambda b, q, k: (q - k <= 2) & (k - q <= 2),
    ),
    "chunked_overlay.<locals>.inner_mask": (
        lambda m: m.chunked_overlay(2, _PADDING),
        lambda b, q, k: (
            (q - _PADDING[b]).div(2, rounding_mode="floor") == (k - _PADDING[b]).div(2, rounding_mode="floor")
        ),
    ),
    "packed_sequence_mask_function.<locals>.inner_mask": (
        lambda m: m.packed_sequence_mask_function(_IDS),
        lambda b, q, k: _IDS[b, q] == _IDS[b, k],
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": (
        lambda m: m.remap_positions_for_packed_sequence(m.causal_mask_function, _PLACES),
        lambda b, q, k: _PLACES[b, k] <= _PLACES[b, q],
    ),
}


def _means_what_it_did(module: Any, name: str) -> bool:
    make, truth = _MEANINGS[name]
    row = torch.arange(2, device="cpu")[:, None, None]
    query, key = torch.arange(6, device="cpu")[:, None], torch.arange(6, device="cpu")
    try:
        function = make(module)
        if function.__qualname__ != name:
            return False
        found = torch.as_tensor(function(row, torch.zeros_like(row), query, key))
        return torch.equal(found.expand(2, 6, 6), truth(row, query, key).expand(2, 6, 6))
    except Exception:  # another version's function may want anything
        return False


def understood(module: Any) -> frozenset[str]:
    """The qualified names of a module's mask functions that mean what `patterns` takes them to mean."""
    return frozenset(name for name in _MEANINGS if _means_what_it_did(module, name))


UNDERSTOOD = understood(_need("masking_utils"))
#: The two that are no closures, which torch.compile may ask for as well; an object that no function is where they are
#: not understood.
UNDERSTOOD_CAUSAL = causal_mask_function if "causal_mask_function" in UNDERSTOOD else object()
UNDERSTOOD_OPEN = bidirectional_mask_function if "bidirectional_mask_function" in UNDERSTOOD else object()
