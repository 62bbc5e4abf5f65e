"""Models of transformers that pick a class of their own for each attention implementation, out of a table by name.

Most call whatever is registered under the name in their config. A dozen older ones know a few names only (Falcon, Bark,
SAM, data2vec-vision, ...) and end in a KeyError for any other. They are given their eager class instead.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from ..notice import warn_once


def fall_back_to_eager(name: str) -> None:
    """From now on a model asked for the attention `name` that looks up classes by name uses its eager ones.

    It says so once per model class. Does nothing where this version of transformers has no place to do it at: such
    models then raise transformers' KeyError, as without it.
    """
    from transformers import PreTrainedModel

    # Called in the constructor of each model and part of a model, before its layers are made.
    original = getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None)
    if original is None or hasattr(original, "_fastattn"):
        return

    @functools.wraps(original)
    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation == name:
            _complete_tables(type(self), name)
        return original(self, attn_implementation, *args, **kwargs)

    check._fastattn = True  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = check


def _complete_tables(model: type, name: str) -> None:
    tables = [x for x in vars(sys.modules[model.__module__]).values() if _is_table(x)]
    for table in tables:
        table.setdefault(name, table["eager"])
    if tables:
        warn_once(
            f'attn_implementation="{name}": layers of {model.__name__} choose among attention classes of their own in '
            "this version of transformers, and use the eager one, without fastattn.",
            kind=f"attention classes of {model.__module__}",
        )


def _is_table(x: Any) -> bool:
    return isinstance(x, dict) and isinstance(x.get("eager"), type) and issubclass(x["eager"], nn.Module)
