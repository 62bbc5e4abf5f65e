"""Checks that a model's weights fit its config: by the headers before loading, and by the loaded model."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from ...common.failures import Refused, blame
from .directory import CONFIG, Stored

#: A model may have this many times as many numbers as its files: packed weights hold up to 8 numbers in a byte, and
#: tied or computed weights are in no file.
_TIMES = 64
_BASE = 1 << 24  #: numbers in addition to that
_FLOATING = ("F", "BF", "E")  #: prefixes of safetensors' names of floating dtypes


def create_on_meta(path: Path, config: Any, stored: dict[str, Stored], trust_remote_code: bool) -> nn.Module:
    """The model that a config describes, on the meta device.

    Raises ValueError if there is no such causal language model, or if it is absurdly larger than the files: a config
    can have any number of layers of any size, and each would be filled with random numbers.
    """
    from transformers import AutoModelForCausalLM

    with (
        blame(f"{path / CONFIG}: cannot be loaded as a causal language model"),
        torch.device("meta"),
        _bounded(path / CONFIG, stored),
    ):
        found: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    return found


def check_dtypes(model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raises ValueError for a weight of integers where the model has floating point numbers: it would be converted.

    model: from `create_on_meta`. Not for quantized models, whose weights transformers' quantizers read.
    """
    dtypes = {name: x.dtype for name, x in [*model.named_parameters(), *model.named_buffers()]}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, one in sorted(stored.items()):
        if one.dtype.startswith(_FLOATING):
            continue
        dtype = next((dtypes[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in dtypes), None)
        if dtype.is_floating_point if dtype else len(one.shape) > 1 and name.endswith(".weight"):
            raise Refused(f"{one.file}: {name}: expected floating point numbers, got {one.dtype}")


def check_loaded(path: Path, model: nn.Module, info: dict[str, Any], stored: dict[str, Stored], part: bool) -> None:
    """Raises ValueError, naming the first tensor, if the weights did not fit the model.

    info: transformers' report of the loading. It fills missing and unusable weights with random numbers, and only
        warns.
    part: the model is only the text part of the directory's model; weights of other parts are ignored.
    """
    for name, has, wants in sorted(info["mismatched_keys"]):
        file = _file_of(path, name, stored)
        raise Refused(f"{file}: {name}: expected shape {list(wants)}, as the config says, got {list(has)}")
    if missing := sorted(info["missing_keys"]):
        raise Refused(
            f"{path}: expected weights for every parameter, {len(missing)} are missing: {missing[0]}"
            + (", ..." if missing[1:] else "")
        )
    unknown = sorted(name for name in info["unexpected_keys"] if not part or _belongs(model, name))
    if unknown:
        file = _file_of(path, unknown[0], stored)
        raise Refused(f"{file}: {unknown[0]}: expected no such weight: the model that the config describes has none")


def check_finite(path: Path, model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raises ValueError, naming the tensor, for a weight that is NaN or infinite. Reads each weight once, in place."""
    names: list[str] = []
    bounds: list[Tensor] = []
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not isinstance(local, Tensor) or not local.is_floating_point() or not local.numel() or local.is_meta:
            continue
        if local.element_size() == 1:
            local = local.half()  # torch has no reductions of 8-bit floats
        low, high = local.detach().aminmax()  # the reduction that needs no memory and propagates NaN
        names.append(name)
        bounds.append(torch.stack([low, high]).double())
    for name, (low, high) in zip(names, torch.stack([x.cpu() for x in bounds]).tolist() if bounds else ()):
        if not (math.isfinite(low) and math.isfinite(high)):
            dtype = str(model.state_dict()[name].dtype).removeprefix("torch.")
            raise Refused(
                f"{_file_of(path, name, stored)}: {name}: expected finite numbers, got NaN or infinity (in {dtype})"
            )


def check_runs(path: Path, model: Any, rows: int) -> None:
    """Raises ValueError unless the model runs on two tokens, which finds other mistakes of its config.

    rows: of its embedding.
    """
    ids = torch.tensor([[0, rows - 1]], device=model.device)
    with torch.no_grad(), blame(f"{path}: the model cannot be run as config.json describes it"):
        logits = model(input_ids=ids).logits
        if logits.isnan().any():
            raise Refused(f"{path}: the model gives NaN as config.json describes it")


@contextmanager
def _bounded(config: Path, stored: dict[str, Stored]) -> Iterator[None]:
    """Raises `Refused` as soon as a model created within the block, on this thread, is far larger than the files."""
    most_tensors = _TIMES * len(stored) + 10_000
    most_numbers = _TIMES * sum(math.prod(one.shape) for one in stored.values()) + _BASE
    thread, tensors, numbers = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        if tensor is None or threading.get_ident() != thread:
            return
        tensors, numbers = tensors + 1, numbers + tensor.numel()
        if tensors > most_tensors or numbers > most_numbers:
            size = f"{type(module).__name__}.{name} of shape {list(tensor.shape)}"
            raise Refused(f"{config}: describes a model far larger than its weights: the {tensors}th is {size}")

    hooks = [
        registry.register_module_parameter_registration_hook(count),
        registry.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _file_of(path: Path, name: str, stored: dict[str, Stored]) -> Path:
    """The file of a tensor; the directory if transformers renamed it."""
    if name in stored:
        return stored[name].file
    ends = [one.file for other, one in stored.items() if other.endswith("." + name) or name.endswith("." + other)]
    return ends[0] if ends else path


def _belongs(model: nn.Module, name: str) -> bool:
    """Whether a tensor's name is that of a module of the model, below its root or its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    first, _, rest = name.partition(".")
    if first == prefix and rest:
        return hasattr(getattr(model, prefix), rest.partition(".")[0])
    return hasattr(model, first)
