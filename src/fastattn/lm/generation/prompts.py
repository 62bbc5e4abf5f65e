"""`encode`: from a prompt to its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...common.failures import blame
from ..checks import check_flag, check_ids
from ..loading.loaded import Loaded, max_length
from .chat_template import render_chat

Prompt = str | Sequence[int] | Tensor  #: text, or token ids `[P]`


def encode(loaded: Loaded, prompt: Prompt, *, chat: bool = False, name: str = "prompt") -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: text, or token ids, which are checked and returned.
        chat: puts the text into the model's chat template, as a user's message.
        name: of the prompt in errors.

    Raises ValueError for a model without a tokenizer; with `chat`, for one without a template or with a template that
    fails (see `chat_template`); for a prompt that is no Unicode text, has no tokens, or is as long as the model.
    """
    if loaded.tokenizer is None:
        raise ValueError(f"loaded: {loaded.name} has no tokenizer; expected a model directory that has one")
    check_flag("chat", chat)
    if not isinstance(prompt, str):
        if chat:
            raise ValueError(f"{name}: expected text for the chat template, got {type(prompt).__name__}")
        ids = check_ids(name, prompt)
    else:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # half of a character, or bytes that were no UTF-8
            raise ValueError(f"{name}: expected Unicode text, got a lone surrogate: the text was no UTF-8")
        if chat:
            prompt = render_chat(loaded.tokenizer, [{"role": "user", "content": prompt}])
        # A template contains the special tokens itself.
        with blame(f"{name}: the model's tokenizer cannot take this text"):
            ids = loaded.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError(f"{name}: expected some text, this one has no tokens")
    if len(ids) >= max_length(loaded):
        raise ValueError(f"{name}: expected fewer tokens than the model's {max_length(loaded)}, got {len(ids)}")
    return ids
