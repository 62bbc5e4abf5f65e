"""Models of text and something else: their towers alone, and what these say amid text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checks import Check, generated, gradients, outputs, pad_mask, select, trimmed
from .compare import Result, floats
from .inputs import BATCH, candidates, lookup, parameters, tokens, variants
from .models import seed

#: What a modality is asked by, and which token stands for it.
TOWERS = {
    "image": ("get_image_features", ("image_token_id", "image_token_index")),
    "video": ("get_video_features", ("video_token_id", "video_token_index")),
    "audio": ("get_audio_features", ("audio_token_id", "audio_token_index")),
    "text": ("get_text_features", ()),
}


def media_checks(model: PreTrainedModel, notes: dict[str, str]) -> dict[str, Check]:
    """Checks of each tower that eager can be asked. notes: is told what could not be asked, and why."""
    found: dict[str, Check] = {}
    for modality, (method, names) in TOWERS.items():
        if not hasattr(model, method):
            continue
        given = _first_that_runs(model, method, notes)
        if given is None:
            continue
        found[f"{modality} tower"] = lambda m, method=method, given=given: tower(m, method, given)
        token = next((lookup(model.config, name) for name in names if lookup(model.config, name) is not None), None)
        amid = None if token is None else _amid_text(model, method, given, token)
        if amid is None:
            notes[f"{modality} amid text"] = "no inputs found"
            continue
        found[f"{modality} amid text"] = lambda m, amid=amid: outputs(m, **amid)
        if model.can_generate():
            found[f"generate from {modality}"] = lambda m, amid=amid: generated(m, amid)
    if not any(name.endswith("amid text") for name in found):
        found |= _mixed(model)
    return found


def _mixed(model: PreTrainedModel) -> dict[str, Check]:
    """Text and something else where no token stands for it: read by cross-attention, or put in front."""
    inputs = next((given for given in candidates(model, mixed=True) if _runs(model, given)), None)
    if inputs is None:
        return {}
    found: dict[str, Check] = {"media with text": lambda m: outputs(m, **inputs)}
    if "attention_mask" in parameters(model):
        mask = pad_mask("left")
        padded = {**inputs, "attention_mask": mask}
        found["media with text, left padded"] = lambda m: select(outputs(m, **padded), mask)
    for name in inputs:
        if name.endswith("mask"):
            fewer = {n: value for n, value in inputs.items() if n != name}
            found[f"media with text, no {name}"] = lambda m, fewer=fewer: outputs(m, **fewer)
    found["media with text, gradients"] = lambda m: gradients(m, inputs)
    if model.can_generate():
        found["generate from media with text"] = lambda m: generated(m, inputs)
    return found


def _runs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    try:
        return bool(outputs(model, **inputs))
    except Exception:
        return False


def amid_text(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inputs for models that take no text without a picture or a sound in it."""
    for method, names in TOWERS.values():
        token = next((lookup(model.config, name) for name in names if lookup(model.config, name) is not None), None)
        if token is not None and hasattr(model, method):
            given = _first_that_runs(model, method, {})
            amid = None if given is None else _amid_text(model, method, given, token)
            if amid is not None:
                yield amid


@torch.no_grad()
def tower(model: PreTrainedModel, method: str, given: dict[str, Tensor]) -> Result:
    seed()
    return trimmed(floats(getattr(model, method)(**given)), given)


def _arguments(model: Any, method: str) -> dict[str, inspect.Parameter]:
    """Of the method, or of that of the model inside which it hands everything on to."""
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {name: p for name, p in parameters(model, method).items() if p.kind not in various}
    inner = getattr(model, "model", None)
    return known if known or not hasattr(inner, method) else _arguments(inner, method)


def _first_that_runs(model: PreTrainedModel, method: str, notes: dict[str, str]) -> dict[str, Tensor] | None:
    known = _arguments(model, method)
    required = [name for name, p in known.items() if p.default is inspect.Parameter.empty]
    required = required or list(known)[:1]
    error = "no arguments"
    for part in variants(required[0], model, required)[:60]:
        given = {name: value for name, value in part.items() if name in known}
        for name in required:
            if name not in given:
                given |= {n: v for n, v in variants(name, model, required)[0].items() if n in known and n not in given}
        try:
            if tower(model, method, given):
                return given
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
    notes[method] = error[:200]
    return None


def _amid_text(model: PreTrainedModel, method: str, given: dict[str, Tensor], token: int) -> dict[str, Tensor] | None:
    """Text around as many placeholders as the tower gives vectors."""
    with torch.no_grad():
        seed()
        features = floats(getattr(model, method)(**given))
    counts: dict[int, None] = {}
    for value in features.values():
        rows = value.numel() // value.shape[-1]
        counts |= {
            count: None for count in (rows // BATCH, value.shape[-2] if value.dim() > 1 else 0) if 0 < count < 700
        }
    known = parameters(model)
    for count in counts:
        ids = torch.cat([tokens(3), torch.full((BATCH, count), token), tokens(4)], 1)
        placed = (ids == token).long()
        for extra in ({"mm_token_type_ids": placed}, {"token_type_ids": placed}, {}):
            if not extra.keys() <= known.keys():
                continue
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given, **extra}
            inputs = {name: value for name, value in inputs.items() if name in known}
            if _runs(model, inputs):
                return inputs
    return None
