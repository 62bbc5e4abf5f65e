"""Models of transformers whose layers do not call the attention that is registered under the name in their config.

Some pick a class of their own out of a table by name, and end in a KeyError for a name that is not in it (Falcon, Bark,
SAM, data2vec-vision): they are given their eager class. Others compute attention themselves, whatever the name (Bloom,
DeBERTa, XLNet). Both are told when the model is made, once for each family.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.notice import warn_once
from .functions import innermost
from .transformers import attention_name

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def watch_models(name: str) -> None:
    """From now on a model that is made for, or switched to, the attention `name` gets eager classes, or a warning.

    Does nothing where this version of transformers has no place to do it at: models with a table then raise
    transformers' KeyError, as without it.
    """
    from transformers import PreTrainedModel

    def before(model: Any, implementation: str | None, *args: Any, **kwargs: Any) -> None:
        """In the constructor of each model and part of a model before its layers are made, and when it is switched."""
        if implementation == name:
            _complete_tables(type(model), name)
            _warn_of_own_attention(model, name)  # of layers that are there already

    def after(model: Any, *args: Any, **kwargs: Any) -> None:
        if attention_name(model.config) == name:
            _warn_of_own_attention(model, name)

    _call_first(PreTrainedModel, "_check_and_adjust_attn_implementation", before)
    _call_first(PreTrainedModel, "post_init", after)


def _call_first(owner: type, method: str, function: Callable[..., None]) -> None:
    original = getattr(owner, method, None)
    if original is None or hasattr(original, "_fastattn"):
        return

    @functools.wraps(original)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        function(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    both._fastattn = True  # type: ignore[attr-defined]
    setattr(owner, method, both)


def _complete_tables(model: type, name: str) -> None:
    tables = [x for x in vars(sys.modules[model.__module__]).values() if _is_table(x)]
    for table in tables:
        table.setdefault(name, table["eager"])
    if tables:
        warn_once(
            f'attn_implementation="{name}": layers of {model.__name__} choose among attention classes of their own in '
            "this version of transformers, and use the eager one, without fastattn.",
            kind=f"attention of {model.__module__}",
        )


def _is_table(x: Any) -> bool:
    return isinstance(x, dict) and isinstance(x.get("eager"), type) and issubclass(x["eager"], nn.Module)


def _warn_of_own_attention(model: Any, name: str) -> None:
    if not type(model).__module__.startswith("transformers."):
        return
    for kind in {type(module) for module in model.modules() if is_attention(module)}:
        if kind.__module__.startswith("transformers.") and not asks_for_implementation(kind):
            warn_once(
                f'attn_implementation="{name}": {kind.__name__} of {type(model).__name__} computes attention itself in '
                "this version of transformers, and goes on doing so without fastattn.",
                kind=f"attention of {kind.__module__}",
            )


def is_attention(module: Any) -> bool:
    """Whether a module is called an attention, and none within it is."""
    if "Attention" not in type(module).__name__ or next(module.parameters(), None) is None:
        return False
    return not any("Attention" in type(x).__name__ for x in module.modules() if x is not module)


def asks_for_implementation(kind: type) -> bool:
    """Whether a class of layers looks up the attention function that its config names."""
    methods = [x for x in vars(kind).values() if callable(x)] + [kind.forward]  # type: ignore[attr-defined]
    codes = (getattr(innermost(method), "__code__", None) for method in methods)
    return any(code is not None and _INTERFACE in code.co_names for code in codes)
