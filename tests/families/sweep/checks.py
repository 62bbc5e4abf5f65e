"""What is run of each model: functions of a model that return the tensors to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .compare import LEFT_OUT, Result, floats
from .inputs import BATCH, DECODED, LENGTH, parameters
from .models import seed

Check = Callable[[PreTrainedModel], Result]
PADS = 4  #: padding tokens of the second row
GENERATED = 6


def forward(model: PreTrainedModel, **inputs: Any) -> Any:
    seed()
    return model(**inputs)


@torch.no_grad()
def outputs(model: PreTrainedModel, **inputs: Any) -> Result:
    return trimmed(floats(forward(model, **inputs)), inputs)


def trimmed(result: Result, inputs: dict[str, Any]) -> Result:
    """Without what padded frames or patches became, if a mask among the inputs names any (in their second row)."""
    masks = [v for name, v in inputs.items() if isinstance(v, Tensor) and "mask" in name and name != "attention_mask"]
    masks += [v for name, v in inputs.items() if name == "attention_mask" and "input_ids" not in inputs]
    if all(bool(mask.all()) for mask in masks):
        return result
    kept: Result = {}
    for name, value in result.items():
        if value.dim() >= 3 and value.shape[0] == BATCH:
            kept[f"{name}, first row"] = value[0]
            kept[f"{name}, second row"] = value[1, : value.shape[1] // 2]
        else:
            kept[name] = value
    return kept


def checks(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Check]:
    """Every check that these inputs allow, by name. Those that eager cannot do are found when they are run."""
    seed(2)
    known = parameters(model)
    found: dict[str, Check] = {"plain": lambda m: outputs(m, **inputs)}
    if all(value.dim() and value.shape[0] == BATCH for value in inputs.values()):
        found["one row"] = lambda m: outputs(m, **{name: value[:1] for name, value in inputs.items()})
    ids = inputs.get("input_ids")
    texts = ids is not None and ids.dim() == 2 and ids.shape == (BATCH, LENGTH)
    if texts and "attention_mask" in known:
        found |= _masked(inputs)
        if model.can_generate():
            found |= _cached(model, inputs)
    elif "attention_mask" in known:
        found |= _shortened(inputs)
    if model.can_generate():
        found["generate"] = lambda m: generated(m, inputs)
    found["gradients"] = lambda m: gradients(m, inputs)
    if "left padded" in found:
        mask = pad_mask("left")
        found["gradients, left padded"] = lambda m: gradients(m, {**inputs, "attention_mask": mask}, mask)
        found["gradients, right padded"] = lambda m: gradients(
            m, {**inputs, "attention_mask": mask.flip(1)}, mask.flip(1)
        )
    return found


def pad_mask(side: str, length: int = LENGTH) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if side == "left":
        mask[1, :PADS] = 0
    elif side == "right":
        mask[1, -PADS:] = 0
    elif side == "holes":
        mask[1, 3:5] = mask[0, 6] = 0
    return mask


def select(result: Result, mask: Tensor) -> Result:
    """Real positions only. What is neither by token of the text nor by token of a decoder is left out."""
    kept: Result = {}
    for name, value in result.items():
        if value.shape[:2] == mask.shape:
            kept[name] = value[mask.bool()]
        elif value.shape[:2] == (BATCH, DECODED) and value.dim() == 3:
            kept[name] = value
    return kept


def _masked(inputs: dict[str, Tensor]) -> dict[str, Check]:
    def run(side: str) -> Check:
        mask = pad_mask(side)
        return lambda m: select(outputs(m, **{**inputs, "attention_mask": mask}), mask)

    found = {
        "mask of ones": run("none"),
        "left padded": run("left"),
        "right padded": run("right"),
        "holes": run("holes"),
    }
    if "decoder_input_ids" in inputs:
        mask = pad_mask("left", DECODED)
        both = {**inputs, "attention_mask": pad_mask("right"), "decoder_attention_mask": mask}

        def decoder(m: PreTrainedModel) -> Result:
            if "decoder_attention_mask" not in parameters(m):
                raise NotImplementedError
            return {name: v[mask.bool()] for name, v in outputs(m, **both).items() if v.shape[:2] == mask.shape}

        found["decoder left padded"] = decoder
    return found


def _shortened(inputs: dict[str, Tensor]) -> dict[str, Check]:
    """Audio: the second row ends early. Compared are the first row and half of the second."""
    name, value = next(iter(inputs.items()))
    lengths = {value.shape[-1]} if value.dim() == 2 else {value.shape[1], value.shape[-1]}

    def run(length: int) -> Check:
        mask = torch.ones(value.shape[0], length, dtype=torch.long)
        mask[1, length * 3 // 4 :] = 0

        return lambda m: outputs(m, **{**inputs, "attention_mask": mask})

    return {f"right padded, {length}": run(length) for length in sorted(lengths)}


def _cached(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Check]:
    if "decoder_input_ids" in inputs:
        return {"cache": lambda m: decoded_in_steps(m, inputs, [3, 1, 2])}
    steps = [8, 1, LENGTH - 9]
    return {
        "cache": lambda m: in_steps(m, inputs, steps, None),
        "cache, left padded": lambda m: in_steps(m, inputs, steps, pad_mask("left")),
    }


def cache_name(model: PreTrainedModel) -> str:
    """transformers renamed the argument."""
    known = parameters(model)
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise NotImplementedError("no cache")


def cache_of(out: Any) -> Any:
    for name in ("cache", "past_key_values"):
        if out.get(name) is not None:
            return out[name]
    raise NotImplementedError("no cache")


@torch.no_grad()
def in_steps(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: list[int], mask: Tensor | None, cache: Any = None
) -> Result:
    """The tokens a few at a time over a cache."""
    name, found, start = cache_name(model), {}, 0
    position = None
    if mask is not None and "position_ids" in parameters(model):
        position = (mask.cumsum(-1) - 1).clamp(min=0)
    for step, count in enumerate(steps):
        stop = start + count
        part: dict[str, Any] = {"input_ids": inputs["input_ids"][:, start:stop], "use_cache": True}
        if mask is not None:
            part["attention_mask"] = mask[:, :stop]
        if position is not None:
            part["position_ids"] = position[:, start:stop]
        if cache is not None:
            part[name] = cache
        out = forward(model, **part)
        cache = cache_of(out)
        real = torch.ones(BATCH, count, dtype=torch.long) if mask is None else mask[:, start:stop]
        found |= {f"step {step}, {key}": value for key, value in select(floats(out), real).items()}
        start = stop
    return found


@torch.no_grad()
def decoded_in_steps(model: PreTrainedModel, inputs: dict[str, Tensor], steps: list[int]) -> Result:
    """The same in the decoder of an encoder whose second row is padded."""
    name, found, start, cache = cache_name(model), {}, 0, None
    ids, mask = inputs["decoder_input_ids"], pad_mask("right")
    seed()
    encoded = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask)
    for step, count in enumerate(steps):
        part: dict[str, Any] = {"decoder_input_ids": ids[:, start : start + count], "use_cache": True}
        if cache is not None:
            part[name] = cache
        out = forward(model, encoder_outputs=encoded, attention_mask=mask, **part)
        cache = cache_of(out)
        found[f"step {step}"] = next(iter(floats(out).values()))
        start += count
    return found


@torch.no_grad()
def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: Any) -> Result:
    """The logits of each greedy step, up to the first token that ties may have decided."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    ids = given.get("input_ids")
    if ids is not None and ids.shape == (BATCH, LENGTH) and "attention_mask" in parameters(model):
        given["attention_mask"] = pad_mask("right" if model.config.is_encoder_decoder else "left")
    seed()
    options: dict[str, Any] = {"max_new_tokens": GENERATED, "do_sample": False, "num_beams": 1, **settings}
    out = model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    found = {f"step {i}": logits for i, logits in enumerate(out.logits)}
    found["tokens"] = out.sequences.float()
    return found


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor | None = None) -> Result:
    """Of every parameter, embeddings included, for a loss that reads every (real) output."""
    model.zero_grad()
    out = forward(model, **inputs)
    loss, generator = torch.zeros((), dtype=torch.float64), torch.Generator().manual_seed(3)
    for value in trimmed({str(i): v for i, v in enumerate(_differentiable(out))}, inputs).values():
        if mask is not None:
            if value.shape[:2] != mask.shape:
                continue
            value = value[mask.bool()]
        value = value[value.isfinite() & (value.abs() < 1e30)]
        loss = loss + (value * torch.randn(value.shape, generator=generator)).sum() / max(value.numel(), 1) ** 0.5
    loss.backward()
    found = {name: p.grad.detach().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"gradients": loss.detach()[None], **found}


def _differentiable(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad and value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        parts = [part for name, part in value.items() if not LEFT_OUT.search(str(name))]
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else []
    return [tensor for part in parts for tensor in _differentiable(part)]
