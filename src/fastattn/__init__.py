"""fastattn: one attention call for PyTorch, fast in prefill, decode and training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Explanation, explain, scaled_dot_product_attention
    from .cache import KVCache
    from .common.notice import FastattnWarning
    from .counters import clear_plans, stats
    from .dispatch.registry import BackendError, use_backend
    from .flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from .masks import Intervals, Segments
    from .varlen import varlen_attention
    from .warming.run import warmup

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "FastattnWarning",
    "Intervals",
    "KVCache",
    "Segments",
    "clear_plans",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
    "stats",
    "use_backend",
    "varlen_attention",
    "warmup",
]

# Looked up on first use: `fastattn --help` need not import torch, and `fastattn doctor` can say that torch is broken.
_HOMES = {
    **dict.fromkeys(("Explanation", "explain", "scaled_dot_product_attention"), "api"),
    **dict.fromkeys(("BackendError", "use_backend"), "dispatch.registry"),
    "FastattnWarning": "common.notice",
    **dict.fromkeys(("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"), "flash"),
    "KVCache": "cache",
    **dict.fromkeys(("Intervals", "Segments"), "masks"),
    **dict.fromkeys(("clear_plans", "stats"), "counters"),
    "varlen_attention": "varlen",
    "warmup": "warming.run",
}

#: Reached as attributes too, without an import of their own.
_MODULES = frozenset(["drop_in", "flash", "hf", "lm", "parallel"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    # Not `hf`, which says what is missing where transformers is: who looks at all names is not to fail.
    return sorted({*globals(), *__all__, *(_MODULES - {"hf"})})
