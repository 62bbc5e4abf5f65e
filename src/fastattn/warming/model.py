"""`warmup_model`: the calls that a transformers model will make, from its config and the source of its layers.

Weights are never read. Calls that cannot be determined this way are left out, and the report names them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .._compat.transformers import is_causal_family
from ..lm.loading.device import pick_device
from ..lm.loading.presets import PRESETS, preset_config
from ..lm.loading.pretrained import read_config as read_directory_config
from .kinds import Attention
from .layers import CACHED, layers_of
from .report import Warmth
from .run import warm


def warmup_model(
    model: str | Path | Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    max_length: int = 8192,
    training: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Warmth:
    """`fastattn.warmup` for a transformers model that runs with `attn_implementation="fastattn"`.

    Args:
        model: a directory with a config.json, a preset ("tiny", "llama-3.2-1b", "llama-3.1-8b"), or a transformers
            config. Only the config is read.
        batch_sizes, device, progress: as in `fastattn.warmup`.
        max_length: the longest sequence; at most the model's `max_position_embeddings`.
        training: also warms up training.
        dtype: default: the config's; for presets bfloat16 on a GPU, float32 on the CPU.
        trust_remote_code: whether code in the directory may be run to read its config.

    Raises:
        ValueError: there is no such model, its config is damaged, or an argument is not as described.
        ImportError: transformers is not installed.
    """
    on = pick_device(device)
    config = read_config(model, trust_remote_code)
    text = config.get_text_config() if not config.is_encoder_decoder else config
    notes: list[str] = []
    if dtype is None:
        dtype = config.dtype or text.dtype
    if dtype is None:
        dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
        if str(model) not in PRESETS:
            notes.append(f"the config names no dtype: {dtype} was made ready")
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and isinstance(max_length, int) and 0 < longest < max_length:
        notes.append(f"max_length is {longest}, the config's max_position_embeddings")
        max_length = longest
    attentions, left_out = attentions_of(config, dtype, max_length, training)
    return warm(
        attentions,
        device=on,
        batch_sizes=batch_sizes,
        max_length=max_length,
        progress=progress,
        notes=[*notes, *left_out],
    )


def read_config(model: str | Path | Any, trust_remote_code: bool = False) -> Any:
    """The transformers config of a directory or a preset, or the given one. Nothing is downloaded."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"warming up a model needs transformers: pip install 'fastattn[hf]' ({error})") from error
    if isinstance(model, transformers.PreTrainedConfig):
        return model
    if os.path.isdir(model):
        return read_directory_config(Path(model), trust_remote_code)
    if str(model) in PRESETS:
        return preset_config(str(model))
    raise ValueError(
        f"model: expected a directory with a config.json, or one of the presets {', '.join(PRESETS)}, "
        f"got {str(model)!r}"
    )


def attentions_of(
    config: Any, dtype: torch.dtype, max_length: int, training: bool = False
) -> tuple[list[Attention], list[str]]:
    """The kinds of attention in a model, and a note for each part that is left out."""
    if config.is_encoder_decoder:
        return _encoder_decoder(config, dtype, max_length, training)
    text = config.get_text_config()
    notes = [
        f"{name}: only the text part of the model is made ready"
        for name in ("vision_config", "audio_config")
        if text is not config and getattr(config, name, None) is not None
    ]
    source, refusal = _source(text)
    if refusal:
        return [], [*notes, refusal]
    causal = _is_causal(text, source)
    if causal is None:
        return [], [*notes, f"{text.model_type}: its code does not say whether its attention is causal"]
    found, more = layers_of(text, source, causal, dtype, max_length, training)
    return found, notes + more


def _encoder_decoder(
    config: Any, dtype: torch.dtype, max_length: int, training: bool
) -> tuple[list[Attention], list[str]]:
    source, refusal = _source(config)
    if refusal:
        return [], [refusal]
    found, notes = [], []
    for role, causal in (("encoder", False), ("decoder", True)):
        part = config.get_text_config(**{role: True})
        attentions, more = layers_of(part, source, causal, dtype, max_length, training)
        found += [replace(a, label=", ".join([role, *filter(None, [a.label])])) for a in attentions]
        notes += [f"{role}: {note}" for note in more]
        if role == "decoder" and attentions:  # its queries see all of the encoder's keys
            phases = ("prefill", *CACHED)
            first = replace(attentions[0], masks=(None,), windows=(None,), phases=phases, layouts=("cache",))
            found.append(replace(first, label="cross attention"))
            if training:
                notes.append("cross attention: made ready for inference, not for training")
    return found, list(dict.fromkeys(notes))


def _source(config: Any) -> tuple[str, str]:
    """The source of a model's layers, or "" and the reason why there is nothing to warm up."""
    name = config.model_type
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        return "", f"{name}: its code is not transformers' own"
    try:
        module = importlib.import_module(home.replace(".configuration_", ".modeling_"))
        source = inspect.getsource(module)
    except (ImportError, OSError) as error:
        return "", f"{name}: the code of its layers cannot be read ({type(error).__name__})"
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return "", f"{name}: its layers compute attention themselves in this version of transformers, without fastattn"
    if re.search(r"\bposition_bias=", source):
        return "", f"{name}: adds a bias to the scores, which needs a plan for each shape"
    return source, ""


def _is_causal(config: Any, source: str) -> bool | None:
    """Whether the attention is causal; None if neither code nor config tells."""
    causal = bool(re.search(r"create_(\w+_)?causal_mask|create_masks_for_generate", source))
    bidirectional = "create_bidirectional" in source
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # ("vision": of images within a text)
        return False
    if causal != bidirectional:
        return causal
    if hasattr(config, "use_bidirectional_attention"):
        return True
    decoder = getattr(config, "is_decoder", None)
    if isinstance(decoder, bool):
        return decoder
    return True if is_causal_family(config.model_type) else None
