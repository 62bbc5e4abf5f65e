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
from .report import Warmth
from .run import warm

#: Layer types with full attention (causal or not), and layer types without attention.
FULL = ("full_attention", "attention", "hybrid")
WITHOUT = ("linear_attention", "conv", "mamba", "moe", "mlp", "sparse", "dense")
#: Rotary embeddings, or attention, that concatenate the halves of a query, which makes the query head-major.
CONCATENATION = re.compile(
    r"torch\.cat\(\s*[\[(]\s*(q|query)_|def _?apply_rotary\w*\((?:(?!\n(?:def|class|@)).)*?torch\.cat\(", re.DOTALL
)
FUSED = re.compile(r"self\.(W?qkv|qkv_proj|query_key_value|c_attn) = ")  #: one projection for queries, keys and values
CACHED = ("chunked", "decode")  #: phases that need a cache


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
    found, more = _layers(text, source, causal, dtype, max_length, training)
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
        attentions, more = _layers(part, source, causal, dtype, max_length, training)
        found += [replace(a, label=role) for a in attentions]
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
    if getattr(config, "use_bidirectional_attention", None) is True:
        return False
    if causal != bidirectional:
        return causal
    if hasattr(config, "use_bidirectional_attention"):
        return True
    decoder = getattr(config, "is_decoder", None)
    if isinstance(decoder, bool):
        return decoder
    return True if is_causal_family(config.model_type) else None


def _layers(
    config: Any, source: str, causal: bool, dtype: torch.dtype, max_length: int, training: bool
) -> tuple[list[Attention], list[str]]:
    try:
        sizes, refusal = _sizes(config, source)
    except Exception as error:  # transformers raises for attributes that differ between layers
        sizes, refusal = (0, 0, 0, 0), f"{config.model_type}: its layers differ ({str(error).splitlines()[0]})"
    if refusal:
        return [], [refusal]
    windows, notes = _windows(config, source, causal, max_length)
    if not windows:
        return [], [*notes, f"{config.model_type}: no layer of its config has an attention that fastattn serves"]
    softcap = getattr(config, "attn_logit_softcapping", None) if re.search(r"\bsoftcap=", source) else None
    once, cached = ("head_major_qk", "head_major") if CONCATENATION.search(source) else ("token_major", "cache")
    phases = ("prefill", "training") if training else ("prefill",)
    general = Attention(
        *sizes,
        dtype,
        masks=("causal" if causal else None,),
        windows=windows,
        softcap=softcap or None,
        phases=phases,
        layouts=(once, cached) if causal else (once,),
        rows=_rows(config, source, *sizes),
    )
    found = [general]
    if causal:
        latent = getattr(config, "qk_nope_head_dim", None) is not None  # may be cached before or after it is expanded
        found.append(replace(general, phases=CACHED, layouts=(once, cached) if latent else (cached,)))
    if "s_aux" in source:
        with_sinks = [replace(a, sinks=True, label="sinks") for a in found]
        found = with_sinks if config.model_type == "gpt_oss" else found + with_sinks
    return found, notes


def _rows(config: Any, source: str, heads: int, kv_heads: int, dim: int, value_dim: int) -> tuple[int, int, int]:
    """See `Attention.rows`. Rotary embeddings create new queries and keys; values remain slices of the projection."""
    if getattr(config, "qk_nope_head_dim", None) is not None:
        return 0, 0, heads * (config.qk_nope_head_dim + value_dim)
    if not FUSED.search(source):
        return 0, 0, 0
    width = heads * dim + kv_heads * (dim + value_dim)
    return (0, 0, width) if "apply_rotary" in source else (width, width, width)


def _sizes(config: Any, source: str) -> tuple[tuple[int, int, int, int], str]:
    """Query heads, K/V heads, head dim and value dim; or zeros and the reason why they are unknown."""
    heads: Any = getattr(config, "num_attention_heads", None)
    grouped = "num_key_value_heads" in source  # the config may have it even if the code does not read it
    kv_heads: Any = (getattr(config, "num_key_value_heads", None) if grouped else None) or heads
    dim: Any = getattr(config, "head_dim", None)
    if dim is None and isinstance(heads, int) and isinstance(getattr(config, "hidden_size", None), int):
        dim = config.hidden_size // heads
    value_dim = dim
    if getattr(config, "qk_nope_head_dim", None) is not None:  # multi-head latent attention: expanded to all heads
        kv_heads, value_dim = heads, getattr(config, "v_head_dim", None)
        dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    found: tuple[Any, Any, Any, Any] = (heads, kv_heads, dim, value_dim)
    for name in ("global_head_dim", "swa_head_dim", "swa_num_attention_heads"):
        if getattr(config, name, None) is not None:
            return (0, 0, 0, 0), f"{config.model_type}: its layers differ in their heads ({name})"
    if not all(isinstance(n, int) and n > 0 for n in found) or heads % kv_heads:
        return (0, 0, 0, 0), f"{config.model_type}: its config does not say how many heads of which size there are"
    return found, ""


def _windows(
    config: Any, source: str, causal: bool, max_length: int
) -> tuple[tuple[tuple[int, int] | None, ...], list[str]]:
    """The windows of a model's layers. A layer with a window is called without one as long as all keys fit into it."""
    window: int = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and "sliding_window" in source else "full_attention"]
    found: dict[tuple[int, int] | None, None] = {}
    notes = []
    for kind in dict.fromkeys(types):
        if kind in FULL or (kind == "sliding_attention" and not window):
            found[None] = None
        elif kind == "sliding_attention":
            found[None] = None
            if causal and window < max_length:
                found[window - 1, 0] = None
            elif not causal and "create_bidirectional_sliding_window_mask" in source:
                if window < max_length:
                    found[window, window] = None
            elif not causal:
                notes.append(f"{kind}: how its window counts is not said by the code")
        elif kind == "chunked_attention":
            found[None] = None
            notes.append(f"{kind}: ready only up to one chunk; beyond it each length needs a plan of its own")
        elif kind not in WITHOUT:
            notes.append(f"{kind}: layers of this type were left out, fastattn does not know them")
    return tuple(found), notes
