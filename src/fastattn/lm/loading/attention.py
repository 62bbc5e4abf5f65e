"""Check and switch the attention implementation of a transformers model."""

from __future__ import annotations

from typing import Any

from ..._compat.transformers import attention_name
from ...common.failures import first_line


def set_attention(model: Any, attn: str) -> None:
    """Switches the attention implementation of a loaded model. The weights are unchanged.

    attn: "fastattn", or any name registered with transformers: "sdpa", "eager", "flash_attention_2", ...

    Raises ValueError when the implementation is unknown, not installed, or not supported by the model.
    """
    check_attention(attn)
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn: {attn} cannot be used here: {first_line(error)}") from error
    if attention_name(model.config) != attn:  # transformers only warns if a model cannot switch
        raise ValueError(f"attn: {type(model).__name__} does not support {attn}")


def check_attention(attn: str) -> None:
    """Raises ValueError for an attention implementation that transformers does not know. Registers "fastattn"."""
    transformers = import_transformers()
    if attn == "fastattn":
        from ...integrations import transformers as hf  # noqa: F401  (importing it registers the name)
    known = {"eager", "fastattn", *transformers.AttentionInterface().valid_keys()}
    if attn not in known:
        common = [name for name in sorted(known) if not name.startswith("paged")]
        raise ValueError(f"attn: expected one of {', '.join(common)}, got {attn!r}")


def import_transformers() -> Any:
    """The module transformers. Raises ImportError, which says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"fastattn.lm needs transformers: pip install 'fastattn[hf]' ({first_line(error)})"
        ) from error
    return transformers
