"""Models of transformers and diffusers, from a config, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .drop_in_models import Inputs, Made


def whisper(tiny: bool) -> Made:
    """Whisper medium: 30 s of sound, and a text."""
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 15, "max_target_positions": 20,
    }  # fmt: skip
    medium: dict[str, Any] = {
        "vocab_size": 51865, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    }  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(**(small if tiny else medium), **special, attn_implementation="sdpa")
    model = transformers.WhisperForConditionalGeneration(config)
    sound = torch.randn(2, 8, 30) if tiny else torch.randn(8, 80, 3000)
    text = torch.randint(3, 59, (2, 9) if tiny else (8, 224))

    def call(model: nn.Module, x: Inputs) -> Tensor:
        found: Tensor = model(x["sound"], decoder_input_ids=x["text"], use_cache=False).logits
        return found

    return Made(model, {"sound": sound, "text": text}, call)


def t5(tiny: bool) -> Made:
    """T5 large: a bias of relative positions in each attention, and padded texts."""
    import transformers

    if not getattr(transformers.T5ForConditionalGeneration, "_supports_sdpa", False):
        raise ImportError(f"T5 of transformers {transformers.__version__} does not call torch's function")
    sizes: dict[str, Any] = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 12}
    sizes |= {"num_heads": 16}
    if tiny:
        sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        **sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, attn_implementation="sdpa"
    )
    model = transformers.T5ForConditionalGeneration(config)
    batch, length, target = (2, 12, 7) if tiny else (8, 512, 128)
    there = torch.ones(batch, length).long()
    there[1::2, length * 2 // 3 :] = 0
    inputs = {
        "text": torch.randint(2, 60, (batch, length)), "there": there, "target": torch.randint(2, 60, (batch, target))
    }  # fmt: skip

    def call(model: nn.Module, x: Inputs) -> Tensor:
        found: Tensor = model(
            input_ids=x["text"], attention_mask=x["there"], decoder_input_ids=x["target"], use_cache=False
        ).logits
        return found

    return Made(model, inputs, call)


def bert(tiny: bool) -> Made:
    """BERT base, 32 padded texts of up to 384 tokens."""
    import transformers

    sizes: dict[str, Any] = {}
    if tiny:
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 64}
    config = transformers.BertConfig(
        **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    batch, length = (2, 12) if tiny else (32, 384)
    lengths = torch.linspace(length // 3, length, batch).int()
    there = torch.arange(length)[None] < lengths[:, None]

    def call(model: nn.Module, x: Inputs) -> Tensor:
        # What padding gives is nobody's.
        found: Tensor = model(input_ids=x["text"], attention_mask=x["there"].long()).last_hidden_state
        return found * x["there"][..., None]

    return Made(model, {"text": torch.randint(2, 60, (batch, length)), "there": there}, call)


def llama(tiny: bool) -> Made:
    """Layers of Llama 3.2 1B: grouped heads."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    if tiny:
        sizes |= {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config)

    def call(model: nn.Module, x: Inputs) -> Tensor:
        found: Tensor = model(input_ids=x["text"], use_cache=False).logits
        return found

    return Made(model, {"text": torch.randint(2, 60, (2, 12) if tiny else (1, 2048))}, call)


def sdxl(tiny: bool) -> Made:
    """diffusers' UNet of SDXL, 1024 x 1024 pixels."""
    import diffusers

    sizes: dict[str, Any] = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    if tiny:
        sizes = {
            "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 24,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 1), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        }  # fmt: skip
    model: Any = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, addition_embed_type="text_time", use_linear_projection=True, **sizes
    )
    side, text, pooled = (16, (11, 24), 16) if tiny else (128, (77, 2048), 1280)
    inputs = {
        "latents": torch.randn(2, 4, side, side), "text": torch.randn(2, *text), "pooled": torch.randn(2, pooled),
        "times": torch.tensor([3, 600]), "ids": 8.0 * side * torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]] * 2),
    }  # fmt: skip

    def call(model: nn.Module, x: Inputs) -> Tensor:
        more = {"text_embeds": x["pooled"], "time_ids": x["ids"]}
        found: Tensor = model(x["latents"], x["times"], x["text"], added_cond_kwargs=more).sample
        return found

    return Made(model, inputs, call)
