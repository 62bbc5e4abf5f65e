"""`Loaded`: a model that is ready for inference, with its tokenizer and its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import rope

if TYPE_CHECKING:
    from ..parallel import Ranks


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference."""

    model: Any  #: transformers' PreTrainedModel, in eval mode
    tokenizer: Any | None  #: None for presets
    config: Any  #: transformers' PretrainedConfig of the text part
    name: str  #: the preset's name, or the directory's
    ranks: Ranks | None = None  #: the ranks that run it together (tensor parallel); None: this process alone
    fused_ops: bool | None = None  #: whether liger-kernel's operations are used, see `load`


def max_length(loaded: Loaded) -> int:
    """The number of positions that the model has, see `rope.max_positions`."""
    return rope.max_positions(loaded.config)


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text: `eos_token_id` of the model's generation_config (one, several or none) and the
    tokenizer's `eos_token`. Raises ValueError unless those are token ids."""
    named = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    found = list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"generation_config: eos_token_id: expected token ids, got {named!r:.80}")
    of_tokenizer = getattr(loaded.tokenizer, "eos_token_id", None)
    return frozenset(token for token in (*found, of_tokenizer) if token is not None and token >= 0)
