"""Adapters (LoRA and others): merged into the model's weights by peft, or refused; never ignored."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...common.failures import Refused, blame
from .directory import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: For transformers' from_pretrained: a folder without an adapter. It would apply an adapter in the model's directory by
#: itself, and not loaded missing weights then.
ELSEWHERE = {"subfolder": "no-adapter-here"}


def find_adapter(model: Path | None, adapter_path: str | Path | None) -> Path | None:
    """The directory of a model's adapter: the one named, or the model's directory if it contains one.

    model: its directory; None for a preset.

    Reads the adapter's config and the header of its weights. Raises ValueError if they are not what peft writes, or if
    there are two adapters; ImportError if peft is needed and not installed.
    """
    beside = model if model is not None and (model / CONFIG).exists() else None
    if adapter_path is None:
        found = beside
    else:
        if not isinstance(adapter_path, (str, Path)):
            raise ValueError(f"adapter_path: expected a directory, got {adapter_path!r:.80}")
        found = Path(adapter_path)
        if not (found / CONFIG).is_file():
            raise Refused(f"adapter_path: expected a directory with {CONFIG} and {WEIGHTS}, got {str(adapter_path)!r}")
        if beside is not None and found.resolve() != beside.resolve():
            raise Refused(
                f"adapter_path: {model} has an adapter of its own beside its weights; expected one of the two"
            )
    if found is None:
        return None
    if beside is not None and not (beside / "config.json").exists():
        raise Refused(f"{model}: holds an adapter and no model; expected the model, and this directory as adapter_path")
    _check(found)
    if find_spec("peft") is None:
        raise ImportError(f"{found / CONFIG}: adapters need peft: pip install 'fastattn[peft]'")
    return found


def _check(path: Path) -> None:
    from safetensors import safe_open

    config, weights = path / CONFIG, path / WEIGHTS
    if not isinstance(read_json(config).get("peft_type"), str):
        raise Refused(f"{config}: expected an adapter that peft wrote, with a peft_type")
    if not weights.is_file():
        raise Refused(f"{weights}: not found; expected the adapter's weights as safetensors")
    with blame(f"{weights}: expected a whole safetensors file, this one is damaged"), safe_open(str(weights), "pt"):
        pass


def apply_adapter(model: Any, path: Path) -> Any:
    """The model with the adapter merged into its weights, whose dtypes are unchanged.

    Raises ValueError, in one line, for an adapter that does not fit the model, has missing or unknown weights, or
    cannot be merged.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with blame(f"{path}: the adapter cannot be applied"), torch.no_grad():
        from peft import PeftConfig, PeftModel
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(str(path))
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise Refused(f"{path}: the adapter is of a kind that cannot be merged into weights: {kind}")
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are checked below
            wrapped = PeftModel.from_pretrained(model, str(path), config=config)
            loaded: Any = set_peft_model_state_dict(wrapped, load_peft_weights(str(path), device=str(model.device)))
        own = [
            name for name in loaded.missing_keys if config.peft_type.value.lower() in name.lower() or "lora_" in name
        ]
        for what, names in (
            ("lacks weights", own),
            ("has weights that the model does not know", loaded.unexpected_keys),
        ):
            if names:
                raise Refused(f"{path / WEIGHTS}: the adapter {what}, {len(names)} in all: {names[0]}")
        try:
            merged = wrapped.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError) as error:
            text = f"{path}: the adapter is of a kind that cannot be merged into weights: {kind}"
            raise Refused(text) from error
    left = [name for name, module in merged.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if left:
        raise Refused(f"{path}: the adapter cannot be merged into the weights of {left[0]}")
    for name, parameter in merged.named_parameters():
        if name in before and parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])
    return merged.eval()
