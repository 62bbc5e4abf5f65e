"""What to feed a model, by the names of its forward's arguments; shapes are found by trying them on eager attention."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .models import seed

BATCH = 2
LENGTH = 14
DECODED = 6  #: tokens that a decoder of an encoder is given
_ORDINARY = (3, 96)  #: token ids that mean nothing special
_MEDIA = (
    *("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values", "flattened_patches"),
    *("audio_input_values", "past_values", "input_audio_embeds", "audio_features"),
)


def parameters(model: Any, method: str = "forward") -> dict[str, inspect.Parameter]:
    """Of the forward itself: decorators keep its signature."""
    return dict(inspect.signature(getattr(model, method)).parameters)


def tokens(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randint(*_ORDINARY, (batch, length))


def lookup(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these attributes that the config or one of those in it has."""
    parts = [config]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, bool):
                return value
        parts += [sub for key in part.sub_configs if isinstance(sub := getattr(part, key, None), PreTrainedConfig)]
    return None


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inputs that the model may take, the likeliest first."""
    known = parameters(model)
    config = model.config
    required = [
        name
        for name, p in known.items()
        if p.default is inspect.Parameter.empty and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    main = model.main_input_name
    names = main if isinstance(main, list) else [main]
    media = [name for name in dict.fromkeys((*names, *_MEDIA)) if name in known and name in _MEDIA]
    text = [name for name in ("input_ids",) if name in known]
    decoded = []
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in required:
        decoded = [name for name in ("decoder_input_ids",) if name in known]
    sets: list[list[str]] = []
    if text:
        sets += [[*text, *decoded, *required], [*text, *required]]
        sets += [[*text, extra, *decoded, *required] for extra in ("attention_mask", "bbox") if extra in known]
    for name in media:
        sets += [[name, *required], [name, *decoded, *required], [*text, name, *decoded, *required]]
    extras = [name for name in ("image_attention_mask", "image_embeds_position_mask") if name in known]
    sets += [[*text, *media, *decoded, *required, *extras], required]
    seen: set[tuple[str, ...]] = set()
    for names in sets:
        key = tuple(dict.fromkeys(names))
        if key in seen or not key:
            continue
        seen.add(key)
        shapes = [list(_shapes(name, config, model)) for name in key]
        for chosen in itertools.islice(itertools.product(*shapes), 40):
            merged: dict[str, Tensor] = {}
            for part in chosen:
                merged |= {key: value for key, value in part.items() if key not in merged}
            yield {name: value for name, value in merged.items() if name in known}


def _shapes(name: str, config: PreTrainedConfig, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Values for this argument, each with what must come along."""
    seed()
    if name in ("input_ids", "decoder_input_ids", "input"):
        yield {name: tokens(DECODED if name == "decoder_input_ids" else LENGTH)}
        books = lookup(config, "num_codebooks", "num_quantizers", "n_codes_total", "num_channels")
        if isinstance(books, int) and books < 40:
            yield {name: torch.randint(*_ORDINARY, (BATCH * books, LENGTH))}
            yield {name: torch.randint(*_ORDINARY, (BATCH, LENGTH, books))}
            yield {name: torch.randint(*_ORDINARY, (BATCH, books, LENGTH))}
    elif name in ("pixel_values", "pixel_values_videos", "images"):
        yield from _pictures(name, config)
    elif name in ("input_features", "audio_features", "input_audio_embeds", "audio_mel"):
        yield from _spectrograms(name, config)
    elif name in ("input_values", "audio_values", "audio_input_values"):
        for count in (1600, 6400):
            yield {name: torch.randn(BATCH, count)}
            yield {name: torch.randn(BATCH, 1, count)}
        yield from _spectrograms(name, config)
    elif name == "flattened_patches":
        patch = lookup(config, "patch_embed_hidden_size") or 768
        values = torch.randn(BATCH, 16, 2 + patch)
        values[..., 0], values[..., 1] = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
        yield {name: values}
    elif name == "past_values":
        yield from _series(config)
    elif name == "bbox":
        yield {name: torch.randint(0, 50, (BATCH, LENGTH, 4)).sort(-1).values}
        yield {name: torch.rand(BATCH, LENGTH, 8)}
    elif name == "hidden_states" and lookup(config, "patch_size"):
        yield from ({name: v["pixel_values"], **v} for v in _pictures("pixel_values", config) if "grid_thw" in v)
    elif name == "codebook_idx":
        yield {name: torch.tensor(1)}
    elif name in (
        "query_embeds",
        "hidden_states",
        "inputs_embeds",
        "encoder_hidden_states",
        "last_hidden_state",
        "encoder_outputs",
    ):
        width = lookup(config, "hidden_size", "d_model", "embed_dim")
        yield {name: torch.randn(BATCH, LENGTH, width if isinstance(width, int) else 32)}
    elif name == "image_attention_mask":
        yield {name: torch.ones(BATCH, LENGTH, 1, dtype=torch.long)}
    elif name == "image_embeds_position_mask":
        seen = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        seen[:, 1 : 1 + (lookup(config, "latent_query_num") or 4)] = 1
        yield {name: seen}
    elif name == "qformer_input_ids":
        yield {name: tokens()}
    elif name in ("image_grid_thw", "grid_thw"):
        yield {name: torch.tensor([[1, 4, 4]] * BATCH)}
    elif name in ("attention_mask", "pixel_mask", "pixel_attention_mask"):
        yield {name: torch.ones(BATCH, LENGTH, dtype=torch.long)}
    elif name == "input_points":
        yield {name: torch.rand(BATCH, 1, 1, 2) * 30}
    else:
        yield {name: torch.randn(BATCH, LENGTH)}


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _pictures(name: str, config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    vision = getattr(config, "vision_config", None) or config
    channels = lookup(vision, "num_channels", "in_channels", "in_chans")
    channels = channels if isinstance(channels, int) else 3
    patch = _pair(lookup(vision, "patch_size") or 16)[0]
    size = lookup(vision, "image_size", "img_size", "pretrain_image_size", "image_resolution")
    sides = [_pair(size)] if isinstance(size, (int, list, tuple)) and size else []
    for height, width in [*sides, *(s for s in [(64, 64), (56, 56), (224, 224)] if s not in sides)]:
        image = torch.randn(BATCH, channels, height, width)
        yield {name: image}
        yield {name: image[:, None]}  # frames, or crops of one image
        yield {name: image[:, None].repeat(1, 2, 1, 1, 1)}
        if name == "pixel_values":
            yield {name: image[:, None], "image_sizes": torch.tensor([[height, width]] * BATCH)}
            yield {name: image, "image_sizes": torch.tensor([[height, width]] * BATCH)}
            yield {
                name: image[:, None, None],
                "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(BATCH, 1, 1, dtype=torch.long),
            }
        if (height, width) == (sides or [(64, 64)])[0]:
            yield from _patches(name, vision, channels, patch)


def _patches(name: str, vision: PreTrainedConfig, channels: int, patch: int) -> Iterator[dict[str, Tensor]]:
    """Pictures of different sizes, end to end or padded."""
    temporal = lookup(vision, "temporal_patch_size")
    temporal = _pair(temporal)[0] if temporal else 1
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    count = int(grid.prod(-1).sum())
    for depth in dict.fromkeys([temporal, 1, 2]):
        flat = torch.randn(count, channels * depth * patch * patch)
        yield {name: flat, "image_grid_thw": grid, "grid_thw": grid, "video_grid_thw": grid}
        yield {name: flat.view(count, channels, depth * patch, patch), "image_grid_hws": grid[:, 1:], "grid_thw": grid}
    packed = torch.randn(BATCH, 16, channels * patch * patch)
    seen = torch.ones(BATCH, 16, dtype=torch.long)
    seen[1, 12:] = 0
    shape = torch.tensor([[4, 4], [3, 4]])
    yield {name: packed, "pixel_attention_mask": seen, "attention_mask": seen, "spatial_shapes": shape}
    place = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1)[None].repeat(BATCH, 1, 1)
    yield {name: packed, "pixel_position_ids": place, "image_position_ids": place}


def _spectrograms(name: str, config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = lookup(
        audio, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", "input_feat_size"
    )
    positions = lookup(audio, "max_source_positions")
    yield {name: torch.randn(BATCH, 1, 64, bins if isinstance(bins, int) else 64)}
    frames = [*([2 * positions] if isinstance(positions, int) else []), 64, 160, 1024]
    for count in frames:
        for size in dict.fromkeys([*([bins] if isinstance(bins, int) else []), 80, 128]):
            seen = torch.ones(BATCH, count, dtype=torch.long)
            seen[1, count * 3 // 4 :] = 0
            for values in (torch.randn(BATCH, size, count), torch.randn(BATCH, count, size)):
                yield {name: values}
                if name == "audio_mel":
                    yield {name: values, "audio_mel_mask": ~seen.bool()}
                for mask in ("input_features_mask", "feature_attention_mask", "audio_attention_mask"):
                    yield {name: values, mask: seen.bool() if mask == "input_features_mask" else seen}


def _series(config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    length = lookup(config, "context_length") or LENGTH
    predicted = lookup(config, "prediction_length") or 6
    lags = max(lookup(config, "lags_sequence") or [0])
    features = getattr(config, "num_time_features", 0) or 0
    past = torch.rand(BATCH, length + lags)
    yield {
        "past_values": past,
        "past_time_features": torch.rand(BATCH, length + lags, features),
        "past_observed_mask": torch.ones_like(past),
        "future_values": torch.rand(BATCH, predicted),
        "future_time_features": torch.rand(BATCH, predicted, features),
    }
    yield {"past_values": torch.rand(BATCH, length, lookup(config, "num_input_channels") or 1)}
    yield {"past_values": torch.rand(BATCH, length)}
