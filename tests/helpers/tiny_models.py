"""Tiny models with random weights, one per family of attention that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
    T5Config,
    logging,
)

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")

logging.set_verbosity_error()

VOCABULARY = 99
WINDOW = 5  #: of sliding layers, shorter than every prompt here

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large, so that who attends to whom shows in the logits
}
_ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def _config(kind: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    return kind(**{**_SIZES, **settings})


DECODERS: dict[str, PreTrainedConfig] = {
    "llama": _config(LlamaConfig),
    "mistral": _config(MistralConfig, sliding_window=WINDOW),
    "qwen3": _config(Qwen3Config),
    "gemma2": _config(Gemma2Config, **_ALTERNATE, query_pre_attn_scalar=11, attn_logit_softcapping=3.0),
    "gemma3": _config(Gemma3TextConfig, **_ALTERNATE, query_pre_attn_scalar=11),
    "gpt_oss": _config(GptOssConfig, **_ALTERNATE, num_local_experts=4, num_experts_per_tok=2),
    "phi3": _config(Phi3Config, sliding_window=WINDOW),
    "cohere2": _config(Cohere2Config, **_ALTERNATE),
    "glm": _config(GlmConfig),
    "olmo2": _config(Olmo2Config),
    "llama4": _config(
        Llama4TextConfig,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
    ),
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": _config(BertConfig),
    "modernbert": _config(
        ModernBertConfig,
        local_attention=6,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
SEQ2SEQ: dict[str, PreTrainedConfig] = {
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=1.5,
        decoder_start_token_id=0,
    ),
    "bart": BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        dropout=0.0,
        init_std=0.3,
        pad_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
_LOADERS = (
    (DECODERS, AutoModelForCausalLM),
    (ENCODERS, AutoModelForMaskedLM),
    (SEQ2SEQ, AutoModelForSeq2SeqLM),
)


def build(family: str, attention: str, **changes: Any) -> PreTrainedModel:
    """The family's model in eval mode, with the same weights for every `attention`."""
    for configs, loader in _LOADERS:
        if family in configs:
            config = type(configs[family])(**{**configs[family].to_dict(), **changes})
            with torch.random.fork_rng():
                torch.manual_seed(1)
                return loader.from_config(config, attn_implementation=attention).eval()
    raise KeyError(family)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, 2-D mask and position ids; row b has 2 b padding tokens on its left."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)
