"""A model from a config: every parameter random, so that nothing hides behind a zero, the same for each attention."""

from __future__ import annotations

import random
import zlib

import numpy
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 100_000_000  #: parameters


class TooLarge(Exception):
    pass


def seed(value: int = 1) -> None:
    """For models that draw random numbers in a forward: hashing, blocks, noise."""
    torch.manual_seed(value)
    numpy.random.seed(value)
    random.seed(value)


def build(name: str, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """The model of this class, in eval mode and float32.

    Raises:
        TooLarge: more than `LARGEST` parameters.
    """
    seed()
    kind = getattr(transformers, name)
    config = type(config).from_dict(config.to_dict())
    for part in [config, *(getattr(config, key, None) for key in config.sub_configs)]:
        if hasattr(part, "is_decoder") and name.endswith(("ForCausalLM", "LMHeadModel")):
            part.is_decoder = True
    if attention == "eager":
        _refuse_large(kind, config)
    model = kind._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    randomize(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = 0
        if getattr(config, "is_encoder_decoder", False) and model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = 1
    return model


def _refuse_large(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    try:
        with torch.device("meta"):
            model = kind(type(config).from_dict(config.to_dict()))
    except Exception:
        return  # not every model can be made without memory
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        raise TooLarge(f"{count / 1e6:.0f} million parameters")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Rows of matrices keep the size of what goes through them, more or less; scales are near 1, offsets near 0."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            center = 1.0 if parameter.numel() and bool((parameter == 1).all()) else 0.0
            parameter.copy_(center + 0.2 * noise)
        elif "embed" in name or "token" in name or "position" in name:
            parameter.copy_(0.5 * noise)
        else:
            fan = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            parameter.copy_(1.3 * noise / max(fan, 1) ** 0.5)


@torch.no_grad()
def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers, those drawn at random when the model was made among them."""
    mine = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
        if name in mine and mine[name].shape == tensor.shape:
            mine[name].copy_(tensor)


def has_attention(model: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.modules())
