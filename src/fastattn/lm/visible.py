"""Which keys the layers of a model see, read from the masks that its forward makes, not from its config.

A config may carry a window that its model has no use for: Llama's layers ignore `sliding_window`, Mistral's do not. A
cache that drops what lies beyond the window is right for the one and wrong for the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .._compat.transformers import attention_name, set_attention_name

Sight = Callable[[int, int], bool]  #: whether the query at one position sees the key at another
_NAME = "fastattn-recorded"
_FAR = 1 << 20  #: tokens


def sights(model: Any) -> dict[int, Sight]:
    """What each layer sees, by its index; without the layers of which it cannot be told.

    The model's forward runs on two tokens, with an attention that keeps the masks and computes nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    functions: dict[int, tuple[Tensor, Any]] = {}
    found: dict[int, Sight | None] = {}

    def mask(batch_size: int, q_length: int, kv_length: int, **rest: Any) -> Tensor:
        made = torch.zeros(batch_size, 1, q_length, kv_length, device=rest.get("device"), dtype=rest.get("dtype"))
        functions[id(made)] = made, rest.get("mask_function")  # kept: no other tensor gets its id
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
    return {index: _sight(function) for index, function in found.items() if function is not None}


def _sight(function: Any) -> Sight:
    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(function(zero, zero, torch.tensor(query), torch.tensor(key)))

    return sees


def sees_everything(sight: Sight) -> bool:
    """Whether a query sees all keys up to its own, and none after it."""
    return _holds(lambda: sight(_FAR, 0) and sight(_FAR, _FAR - 1) and sight(_FAR, _FAR) and not sight(5, 6))


def is_window(sight: Sight, window: int) -> bool:
    """Whether a query sees itself and the window - 1 keys before it, and nothing else."""
    return _holds(
        lambda: all(
            sight(q, q) and sight(q, max(0, q - window + 1)) and not sight(q, q + 1)
            and not (q >= window and sight(q, q - window))
            for q in _places(window)
        )
        and not sight(_FAR, 0)
    )  # fmt: skip


def needs_no_more(sight: Sight | None, window: int) -> bool:
    """Whether no query sees a key that lies `window` or more before it: the last so many are all that is to be kept."""
    if sight is None:
        return False
    return _holds(
        lambda: (
            not any(sight(q, q - far) for q in _places(window) for far in (window, 2 * window) if q >= far)
            and not sight(_FAR, 0)
        )
    )


def _places(window: int) -> tuple[int, ...]:
    return (window - 1, window, window + 1, 2 * window - 1, 2 * window, 3 * window + 1, 7 * window)


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except Exception:  # a function that looks a position up in a tensor of its own
        return False


#: Kinds of layers, as configs call them, whose caches drop what lies beyond a window.
WINDOWED = ("sliding_attention", "chunked_attention")


def kept_whole(config: Any) -> Any:
    """The config with layers that see everything: a cache made by it keeps all keys, which is right whatever the masks
    hide. Layers that keep another state than keys are as they were."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    types = list(getattr(text, "layer_types", None) or ())
    with suppress(AttributeError):  # kinds that follow from other settings: none of them is a window
        if any(kind in WINDOWED for kind in types):
            text.layer_types = types = ["full_attention" if kind in WINDOWED else kind for kind in types]
        if not any("sliding" in kind for kind in types):
            for name in ("sliding_window", "attention_chunk_size"):
                if getattr(text, name, None) is not None:
                    setattr(text, name, None)
    return text
