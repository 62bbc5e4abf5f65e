"""Models of other libraries that call torch's `scaled_dot_product_attention`, tiny and with random weights.

Each function makes one: nothing is downloaded, and all of them take a second or less to run on a CPU. A library that is
not installed skips the test that asks for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _mend_torchvision() -> None:
    """A torchvision that was built for another torch cannot load its own operators, and then not be imported, nor
    transformers beside it. No model here needs these operators."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


_mend_torchvision()


@dataclass
class Recipe:
    """A model, and how it is run."""

    model: nn.Module
    #: What users run without gradients: a forward pass, a whole pipeline or a generation. It gives the same each time.
    infer: Callable[[], Tensor]
    #: A loss to train by.
    loss: Callable[[], Tensor]


def nano_gpt() -> Recipe:
    """A decoder as people write one for themselves, and its greedy generation."""
    torch.manual_seed(0)
    model = _NanoGPT(vocabulary=61, context=24, layers=2, heads=4, width=32)
    tokens = torch.randint(0, 61, (2, 20))

    def infer() -> Tensor:
        text = tokens[:, :5]
        for _ in range(4):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
        return model(text)

    return Recipe(model, infer, lambda: F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


class _NanoGPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(heads, width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).split(width, dim=2)
        q, k, v = (y.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.mlp(self.norms[1](x))


# transformers, with its "sdpa".


def whisper() -> Recipe:
    """Encoder, decoder and cross-attention; greedy generation with a cache."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=15,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=59, decoder_start_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sound, text = torch.randn(2, 8, 30), torch.randint(3, 59, (2, 9))
    names = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in names else "past_key_values"  # older versions have the second name

    def infer() -> Tensor:
        state = model.model.encoder(sound).last_hidden_state
        cache, tokens, logits = None, torch.full((2, 1), 2), []
        for _ in range(4):
            found = model(encoder_outputs=(state,), decoder_input_ids=tokens, use_cache=True, **{argument: cache})
            cache, tokens = found.past_key_values, found.logits[:, -1:].argmax(-1)
            logits.append(found.logits)
        return torch.cat(logits, 1)

    return Recipe(model, infer, lambda: model(sound, labels=text).loss)


def t5() -> Recipe:
    """Relative position biases, which are trained, and a padded text."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    text, there, labels = torch.randint(2, 60, (2, 12)), torch.ones(2, 12).long(), torch.randint(2, 60, (2, 7))
    there[1, 8:] = 0
    return Recipe(
        model,
        lambda: model(input_ids=text, attention_mask=there, decoder_input_ids=labels).logits,
        lambda: model(input_ids=text, attention_mask=there, labels=labels).loss,
    )


# Vision transformers.


def timm_vit() -> Recipe:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=4
    ).eval()
    return _classifier(model)


def torchvision_vit() -> Recipe:
    """`nn.MultiheadAttention`, without the path in C++ that it takes in evaluation without gradients."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros
    recipe = _classifier(model)

    def infer() -> Tensor:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return model(images)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    images = torch.randn(2, 3, 32, 32)
    return Recipe(model, infer, recipe.loss)


def _classifier(model: nn.Module) -> Recipe:
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 0, 5])
    return Recipe(model, lambda: model(images), lambda: F.cross_entropy(model(images), labels))


# diffusers: whole pipelines, of which the text encoders' outputs are given.


def sdxl() -> Recipe:
    """A UNet with self-attention over the image and cross-attention to the text, and the decoder's own attention."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 1), cross_attention_dim=24, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    ).eval()  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=_vae(diffusers), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip
    texts = {
        "prompt_embeds": torch.randn(1, 11, 24),
        "pooled_prompt_embeds": torch.randn(1, 16),
        "negative_prompt_embeds": torch.randn(1, 11, 24),
        "negative_pooled_prompt_embeds": torch.randn(1, 16),
    }
    more = {"text_embeds": torch.randn(2, 16), "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 2)}
    noisy, target, text = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 11, 24)

    def loss() -> Tensor:
        return F.mse_loss(unet(noisy, torch.tensor([3, 600]), text, added_cond_kwargs=more).sample, target)

    return Recipe(unet, lambda: _images(pipeline, **texts), loss)


def flux() -> Recipe:
    """Text and image in one attention."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(diffusers, shift_factor=0.1), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=model,
    )  # fmt: skip
    texts = {"prompt_embeds": torch.randn(1, 11, 24), "pooled_prompt_embeds": torch.randn(1, 16)}
    arguments = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 11, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": _positions(4),
        "txt_ids": torch.zeros(11, 3),
    }
    return Recipe(model, lambda: _images(pipeline, **texts), _regression(model, arguments))


def chroma() -> Recipe:
    """Flux with padded texts: a mask of keys, of which each layer gets the square."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()  # fmt: skip
    pipeline = diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(diffusers, shift_factor=0.1), text_encoder=None,
        tokenizer=None, transformer=model,
    )  # fmt: skip
    there = torch.tensor([[True] * 7 + [False] * 4, [True] * 11])
    texts = {
        "prompt_embeds": torch.randn(1, 11, 24),
        "prompt_attention_mask": there[:1],
        "negative_prompt_embeds": torch.randn(1, 11, 24),
        "negative_prompt_attention_mask": there[1:],
    }
    arguments = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 11, 24),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": _positions(4),
        "txt_ids": torch.zeros(11, 3),
        "attention_mask": torch.cat([there, torch.ones(2, 16, dtype=torch.bool)], 1),
    }
    return Recipe(model, lambda: _images(pipeline, **texts), _regression(model, arguments))


def sd3() -> Recipe:
    """Text and image in one attention, the image before the text."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(diffusers, shift_factor=0.1),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    texts = {
        "prompt_embeds": torch.randn(1, 11, 24),
        "pooled_prompt_embeds": torch.randn(1, 16),
        "negative_prompt_embeds": torch.randn(1, 11, 24),
        "negative_pooled_prompt_embeds": torch.randn(1, 16),
    }
    arguments = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 11, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 600]),
    }
    return Recipe(model, lambda: _images(pipeline, **texts), _regression(model, arguments))


def pixart() -> Recipe:
    """Cross-attention to padded texts, whose mask is an additive one."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=16, patch_size=2, num_layers=2, num_attention_heads=4, attention_head_dim=8, in_channels=4,
        out_channels=8, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    ).eval()  # fmt: skip
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(diffusers), transformer=model,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip
    there = torch.tensor([[1] * 7 + [0] * 4, [1] * 11])
    texts = {
        "prompt_embeds": torch.randn(1, 11, 24),
        "prompt_attention_mask": there[:1],
        "negative_prompt": None,
        "negative_prompt_embeds": torch.randn(1, 11, 24),
        "negative_prompt_attention_mask": there[1:],
        "use_resolution_binning": False,
    }
    arguments = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 11, 24),
        "timestep": torch.tensor([3, 600]),
        "encoder_attention_mask": there,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Recipe(model, lambda: _images(pipeline, **texts), _regression(model, arguments))


def _vae(diffusers: Any, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=32,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    ).eval()  # fmt: skip


def _images(pipeline: Any, **texts: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipeline(
        num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt", **texts
    ).images
    return found


def _positions(side: int) -> Tensor:
    found = torch.zeros(side, side, 3)
    found[..., 1], found[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    return found.reshape(-1, 3)


def _regression(model: nn.Module, arguments: dict[str, Any]) -> Callable[[], Tensor]:
    with torch.no_grad():
        target = torch.randn_like(model(**arguments, return_dict=False)[0])
    return lambda: F.mse_loss(model(**arguments, return_dict=False)[0], target)


RECIPES = (nano_gpt, whisper, t5, timm_vit, torchvision_vit, sdxl, flux, chroma, sd3, pixart)
