"""Mask predicates: which keys the layers of a model see, taken from the masks of its forward and not from its config.

A config may have a window that the model does not use: Llama's layers ignore `sliding_window`, Mistral's use it. A
cache that drops the keys beyond the window is right for Mistral and wrong for Llama.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .._compat.transformers import attention_name, set_attention_name

MaskPredicate = Callable[[int, int], bool]  #: whether the query at one position sees the key at another
_NAME = "fastattn-recorded"
_FAR = 1 << 20  #: a position far from the beginning of a text


def layer_masks(model: Any) -> dict[int, MaskPredicate]:
    """The mask predicate of each layer, by its index. Layers without a known one are left out.

    The model's forward runs on two tokens, with an attention that records the mask of each layer and computes nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    # By the id of the mask tensor: the tensor, kept alive so that no other one gets its id, and its mask function.
    functions: dict[int, tuple[Tensor, Any]] = {}
    found: dict[int, Any] = {}

    def mask(batch_size: int, q_length: int, kv_length: int, **rest: Any) -> Tensor:
        made = torch.zeros(batch_size, 1, q_length, kv_length, device=rest.get("device"), dtype=rest.get("dtype"))
        functions[id(made)] = made, rest.get("mask_function")
        return made

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, None]:
        _, function = functions.get(id(attention_mask), (None, None))
        index = getattr(module, "layer_idx", None)
        if index is not None:
            known = function is not None and (index not in found or found[index] is function)
            found[index] = function if known else None
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    before = attention_name(config)
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, mask)
    try:
        set_attention_name(config, _NAME)
        embeddings = model.get_input_embeddings().weight
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=embeddings.device), use_cache=False)
    except Exception:  # a model that computes with its mask, or chooses its attention elsewhere
        return {}
    finally:
        set_attention_name(config, before)
    return {index: _predicate(function) for index, function in found.items() if function is not None}


def _predicate(mask_function: Any) -> MaskPredicate:
    """transformers' mask function, of tensors (batch, head, query, key), as a predicate of two positions."""

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))

    return sees


def is_causal(sees: MaskPredicate) -> bool:
    """Whether a query sees all keys up to its own, and none after it."""
    return _holds(lambda: sees(_FAR, 0) and sees(_FAR, _FAR - 1) and sees(_FAR, _FAR) and not sees(5, 6))


def is_window(sees: MaskPredicate, window: int) -> bool:
    """Whether a query sees itself and the window - 1 keys before it, and nothing else."""
    return _holds(
        lambda: all(
            sees(q, q) and sees(q, max(0, q - window + 1)) and not sees(q, q + 1)
            and not (q >= window and sees(q, q - window))
            for q in _queries(window)
        )
        and not sees(_FAR, 0)
    )  # fmt: skip


def sees_only_window(sees: MaskPredicate | None, window: int) -> bool:
    """Whether no query sees a key `window` or more before it, so that a cache of the last `window` keys is enough.
    False for None, an unknown mask."""
    if sees is None:
        return False
    return _holds(
        lambda: (
            not any(sees(q, q - far) for q in _queries(window) for far in (window, 2 * window) if q >= far)
            and not sees(_FAR, 0)
        )
    )


def _queries(window: int) -> tuple[int, ...]:
    """Positions around the edges of a window."""
    return (window - 1, window, window + 1, 2 * window - 1, 2 * window, 3 * window + 1, 7 * window)


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:  # a mask function may index a tensor of its own by the position
        return False


#: Types of layers, as configs name them, whose caches drop keys beyond a window.
WINDOWED = ("sliding_attention", "chunked_attention")


def without_windows(config: Any) -> Any:
    """A copy of the config whose layers have no windows. A cache made by it keeps all keys, which is right for every
    mask. Layers with another state than keys and values are unchanged."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    types = list(getattr(text, "layer_types", None) or ())
    with suppress(AttributeError):  # types derived from other settings: none of them is a window
        if any(kind in WINDOWED for kind in types):
            text.layer_types = types = ["full_attention" if kind in WINDOWED else kind for kind in types]
        if not any("sliding" in kind for kind in types):
            for name in ("sliding_window", "attention_chunk_size"):
                if getattr(text, name, None) is not None:
                    setattr(text, name, None)
    return text
