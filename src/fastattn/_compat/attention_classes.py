"""Models of transformers whose layers do not call the attention function that their config names.

Some pick a class of their own out of a table by that name, and end in a KeyError for a name that is not in the table
(Falcon, Bark, SAM, data2vec-vision): they are given their eager class. Others compute attention themselves, whatever
the name (Bloom, DeBERTa, XLNet). Both are warned of when the model is made, once for each family.

transformers does not say which layers call its `AttentionInterface`. A class that does so has the name of the table of
attention functions in its code, which is what `calls_attention_interface` looks for. This module alone knows.
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

_TABLE = "ALL_ATTENTION_FUNCTIONS"


def watch_models(name: str) -> None:
    """From now on a model that is made for, or switched to, the attention `name` gets eager classes, or a warning.

    Wraps two methods of `PreTrainedModel`, because transformers has no hook for it. Does nothing where the installed
    version has no such methods: models with a table then raise transformers' KeyError.
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
    for kind in {type(module) for module in model.modules() if _is_attention(module)}:
        if kind.__module__.startswith("transformers.") and not calls_attention_interface(kind):
            warn_once(
                f'attn_implementation="{name}": {kind.__name__} of {type(model).__name__} computes attention itself in '
                "this version of transformers, and goes on doing so without fastattn.",
                kind=f"attention of {kind.__module__}",
            )


def _is_attention(module: Any) -> bool:
    """Whether a module is called an attention, and none within it is."""
    if "Attention" not in type(module).__name__ or next(module.parameters(), None) is None:
        return False
    return not any("Attention" in type(x).__name__ for x in module.modules() if x is not module)


def calls_attention_interface(kind: type) -> bool:
    """Whether a class of layers looks up the attention function that its config names."""
    methods = [x for x in vars(kind).values() if callable(x)] + [kind.forward]  # type: ignore[attr-defined]
    codes = (getattr(innermost(method), "__code__", None) for method in methods)
    return any(code is not None and _TABLE in code.co_names for code in codes)


def computes_own_attention(model: Any, config: Any) -> bool:
    """Whether none of a model's layers that a config of transformers describes looks up the attention function.

    config: the model's, or that of a part of it. False for code from outside of transformers, which is not judged.
    """
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        return False
    home = home.replace(".configuration_", ".modeling_")
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}  # FSDP2 derives classes of its own
    return not any(kind.__module__ == home and calls_attention_interface(kind) for kind in kinds)
