"""Tiny models of transformers with random weights: one per family of attention, and any config's causal model.

`build` makes the model of a family. `made` makes the causal model of a config, with weights so large that the tokens
show which token attends to which; the functions below it give an engine's tokens and the references for them.
"""

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

import fastattn.hf  # noqa: F401  (registers "fastattn")
from fastattn.lm import Loaded
from fastattn.lm.generation.engine import Engine

logging.set_verbosity_error()

VOCABULARY = 99
WINDOW = 5  #: of sliding layers, shorter than every prompt here

#: Of a config for `made`: nothing ends a generation early.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
_FAMILY_SIZES: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large, so that who attends to whom shows in the logits
}
_ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def _config(kind: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    return kind(**{**_FAMILY_SIZES, **settings})


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


def made(config: Any, attn: str = "fastattn") -> Any:
    """A causal model of the config in float32 and eval mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def loaded(model: Any, tokenizer: Any = None, name: str = "tiny") -> Loaded:
    return Loaded(model, tokenizer, model.config.get_text_config(), name)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (tokens,), generator=generator).tolist()


def tokens_of(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The engine's tokens."""
    found: list[list[int]] = [[] for _ in prompts]
    for event in engine.generate(prompts, count):
        found[event.request].append(event.token)
    return found


@torch.no_grad()
def whole(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens, each by a forward pass over the whole text, without a cache."""
    text = list(ids)
    for _ in range(count):
        text.append(int(model(input_ids=torch.tensor([text]), **options).logits[0, -1].argmax()))
    return text[len(ids) :]


@torch.no_grad()
def generated(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """transformers' own greedy generate."""
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, **options)
    return out[0, len(ids) :].tolist()
