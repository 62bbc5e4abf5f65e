"""Presets: configs of models by name, for models with random weights, whose speed is that of the real ones.

The values are those of the published config.json files (meta-llama/Llama-3.1-8B, meta-llama/Llama-3.2-1B,
google/gemma-2-2b); gpt2 is the 124M one with a vocabulary of 50304 and without dropout, as people train it. gemma-4
has the sizes that transformers gives its text model where nothing is said.
"""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


#: Name -> the entries of config.json; model_type is "llama" unless given.
PRESETS: dict[str, dict[str, Any]] = {
    # Big enough to have grouped heads and a real head dim, small enough for one CPU core.
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_parameters": _rope(32.0),
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": _rope(8.0),
        "tie_word_embeddings": False,
    },
    # Windows in every second layer, a softcap, four norms a layer: runs through transformers' own modules.
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    # Five layers with a window of 512 keys and heads of 256 dims, then one over all keys with heads of 512.
    "gemma-4": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50304,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
}


def preset_config(name: str) -> Any:
    """A preset as transformers' config. Raises ValueError where the installed transformers does not know the family."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    settings = {"model_type": "llama", **PRESETS[name]}
    family = settings.pop("model_type")
    if family not in CONFIG_MAPPING:
        raise ValueError(f"model: {name} needs a newer transformers, {__version__} has no {family}")
    return AutoConfig.for_model(family, **settings)
