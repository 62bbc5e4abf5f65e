"""Models of text and something else: their towers alone, and what these say amid text."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checks import Check, generated, outputs, trimmed
from .compare import Result, floats
from .inputs import BATCH, lookup, parameters, tokens
from .inputs import _shapes as shapes
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
    return found


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


def _first_that_runs(model: PreTrainedModel, method: str, notes: dict[str, str]) -> dict[str, Tensor] | None:
    known = {n: p for n, p in parameters(model, method).items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    required = [name for name, p in known.items() if p.default is inspect.Parameter.empty]
    if not required:
        required = list(known)[:1]
    error = "no arguments"
    for chosen in itertools.islice(
        itertools.product(*(list(shapes(n, model.config, model)) for n in required[:1])), 60
    ):
        given = {name: value for part in chosen for name, value in part.items() if name in known}
        missing = [name for name in required if name not in given]
        for name in missing:
            given |= {n: v for n, v in next(iter(shapes(name, model.config, model))).items() if n in known}
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
            try:
                if outputs(model, **inputs):
                    return inputs
            except Exception:
                continue
    return None
