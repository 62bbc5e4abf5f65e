"""The kinds of attention that the layers of a transformers config compute: heads, dims, windows, memory layouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .._compat.transformers import layer_configs
from .kinds import Attention

#: Layer types with full attention (causal or not), and layer types without attention.
FULL = ("full_attention", "attention", "hybrid")
WITHOUT = ("linear_attention", "conv", "mamba", "moe", "mlp", "sparse", "dense")
#: Rotary embeddings, or attention, that concatenate the halves of a query, which makes the query head-major.
CONCATENATION = re.compile(
    r"torch\.cat\(\s*[\[(]\s*(q|query)_|def _?apply_rotary\w*\((?:(?!\n(?:def|class|@)).)*?torch\.cat\(", re.DOTALL
)
FUSED = re.compile(r"self\.(W?qkv|qkv_proj|query_key_value|c_attn) = ")  #: one projection for queries, keys and values
CACHED = ("chunked", "decode")  #: phases that need a cache


def layers_of(
    config: Any, source: str, causal: bool, dtype: torch.dtype, max_length: int, training: bool
) -> tuple[list[Attention], list[str]]:
    """The kinds of attention of a text model's layers, and a note for each kind of layers that is left out.

    source: the code of its layers. causal: whether their attention is. training: for that phase, too.
    """
    found: dict[Attention, dict[tuple[int, int] | None, None]] = {}
    notes: dict[str, None] = {}
    for layer, types in _different(config):
        sizes, refusal = _sizes(layer, source)
        windows, left_out = _windows(layer, types, source, causal, max_length)
        notes |= dict.fromkeys([refusal] if refusal else left_out)
        if windows and not refusal:
            for a in _attentions(layer, source, sizes, causal, dtype, training):
                found.setdefault(a, {}).update(dict.fromkeys(windows))
    if not found and not any(notes):
        notes[f"{config.model_type}: no layer of its config has an attention that fastattn serves"] = None
    several = len({(a.q_heads, a.kv_heads, a.head_dim, a.value_dim) for a in found}) > 1
    attentions = [replace(a, windows=tuple(windows)) for a, windows in found.items()]
    return [_with_sizes(a) for a in attentions] if several else attentions, list(notes)


def _different(config: Any) -> list[tuple[Any, Sequence[str] | None]]:
    """The configs of the layers that differ, each with their types (None: the config names none). Most models have
    one config for all layers."""
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    layers = layer_configs(config)
    if layers[0] is config:
        return [(config, types)]
    names = sorted(config.per_layer_attributes)
    found: dict[str, tuple[Any, Sequence[str] | None]] = {}
    for i, layer in enumerate(layers):
        own = None if types is None else types[i : i + 1]
        found.setdefault(repr((own, [getattr(layer, name, None) for name in names])), (layer, own))
    return list(found.values())


def _with_sizes(a: Attention) -> Attention:
    """Its name in the report says how many heads of which size there are."""
    dims = f"{a.head_dim}" if a.value_dim == a.head_dim else f"{a.head_dim}/{a.value_dim}"
    sizes = f"{a.q_heads}/{a.kv_heads} heads of {dims}"
    return replace(a, label=f"{sizes}, {a.label}" if a.label else sizes)


def _attentions(
    config: Any, source: str, sizes: tuple[int, int, int, int], causal: bool, dtype: torch.dtype, training: bool
) -> list[Attention]:
    """Of layers that are alike, without their windows."""
    softcap = getattr(config, "attn_logit_softcapping", None) if re.search(r"\bsoftcap=", source) else None
    once, cached = ("head_major_qk", "head_major") if CONCATENATION.search(source) else ("token_major", "cache")
    phases = ("prefill", "training") if training else ("prefill",)
    general = Attention(
        *sizes,
        dtype,
        masks=("causal" if causal else None,),
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
    return found


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
    config: Any, types: Sequence[str] | None, source: str, causal: bool, max_length: int
) -> tuple[tuple[tuple[int, int] | None, ...], list[str]]:
    """The windows of layers of these types, and notes. A layer with a window is called without one as long as all keys
    fit into it."""
    window: int = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
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
