"""`load`: a causal language model from a Hugging Face directory, or a preset with random weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...common.failures import Refused, blame, first_line
from ..fused_ops import check_fused_ops
from ..verification import ReferenceLogits
from .adapters import apply_adapter, find_adapter
from .attention import check_attention, import_transformers
from .device import pick_device
from .directory import read_headers
from .loaded import Loaded
from .presets import PRESETS, preset_config
from .pretrained import check_vocabulary, read_config, read_model, read_tokenizer, rows_of
from .tensor_parallel import create_spread, spread_options

if TYPE_CHECKING:
    from ..parallel import Ranks


def load(
    model: str | Path,
    attn: str = "fastattn",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    fused_ops: bool | None = None,
    trust_remote_code: bool = False,
    adapter_path: str | Path | None = None,
) -> Loaded:
    """Loads a causal language model for inference. Nothing is downloaded.

    Args:
        model: a directory in Hugging Face's layout (config.json, *.safetensors, a tokenizer), or a preset with random
            weights: "tiny", "llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b", "gemma-4", "gpt2". A directory of that name
            takes precedence.
        attn: the attention implementation, see `set_attention`.
        dtype: of the weights. Default: a directory's own; for presets bfloat16 on a GPU, float32 on the CPU.
        device: default: the current GPU if there is one, else the CPU.
        seed: of a preset's weights.
        ranks: the model is spread over them by its tensor parallel plan in transformers: each has a part of the weights
            on its own device. The random weights of a preset differ from those of one process. See
            `fastattn.lm.parallel.join`.
        fused_ops: whether liger-kernel's norms, rotary embeddings and activations replace transformers' own while a
            runner runs the model through transformers' modules; the model itself is not changed. None: on a GPU, if
            liger-kernel is installed. True: it is required. False: never.
        trust_remote_code: whether code in the directory may be run. If not, a model that needs other classes than
            transformers' own is refused.
        adapter_path: a directory with an adapter written by peft: adapter_config.json, adapter_model.safetensors. It is
            merged into the weights. Default: the adapter in the model's directory, if there is one.

    Raises:
        ValueError: there is no such model, or it is incomplete or damaged: the message, one line, names the path and
            what was expected there. Weights of other shapes than the config's, unknown weights, NaN and infinity count
            as damage. The device or the attention implementation is not available. The model has no tensor parallel
            plan, or heads that the ranks do not divide. `fused_ops` without a GPU, or with `ranks`. It is no causal
            language model (see `verification.ReferenceLogits`). The adapter does not fit, or cannot be merged.
        ImportError: transformers is not installed, or too old for `ranks`; or liger-kernel is not, for `fused_ops`; or
            peft is not, for an adapter.
    """
    import_transformers()
    on = pick_device(device) if ranks is None else ranks.device
    if fused_ops:
        if ranks is not None:
            raise ValueError("fused_ops: cannot be used with a model that is spread over ranks")
        check_fused_ops(on)
    path = Path(model)
    is_directory = os.path.isdir(model)  # False as well if that cannot be determined
    adapter = find_adapter(path if is_directory else None, adapter_path)
    if adapter is not None and ranks is not None:
        raise ValueError("adapter_path: cannot be used with a model that is spread over ranks")
    if is_directory:
        loaded = _load_directory(path, attn, dtype, on, ranks, trust_remote_code)
    elif str(model) in PRESETS:
        loaded = _create(str(model), attn, dtype, on, seed, ranks)
    else:
        raise ValueError(
            f"model: expected a directory with config.json, *.safetensors and a tokenizer, "
            f"or one of the presets {', '.join(PRESETS)}, got {str(model)!r}"
        )
    if adapter is not None:
        loaded = replace(loaded, model=apply_adapter(loaded.model, adapter))
    if is_directory and ranks is None:
        ReferenceLogits(loaded.model)  # refuses other models before the first prompt does
    return replace(loaded, fused_ops=fused_ops)


def _load_directory(
    path: Path,
    attn: str,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: Ranks | None,
    trust_remote_code: bool,
) -> Loaded:
    check_attention(attn)
    with blame(f"{path}: cannot be loaded"):
        config = read_config(path, trust_remote_code)
        if config.is_encoder_decoder:
            raise Refused(f"{path}: cannot be loaded as a causal language model: {config.model_type} has an encoder")
        stored = read_headers(path)
        tokenizer = read_tokenizer(path, config, trust_remote_code)
    spread = spread_options(config, ranks, trust_remote_code)
    with blame(f"{path}: cannot be loaded"):
        model = read_model(
            path,
            config,
            stored,
            trust_remote_code,
            None if spread else device,
            dtype=dtype or "auto",
            attn_implementation=attn,
            **spread,
        )
        check_vocabulary(path, tokenizer, rows_of(model))
    return Loaded(model, tokenizer, config.get_text_config(), path.resolve().name, ranks)


def _create(
    name: str, attn: str, dtype: torch.dtype | None, device: torch.device, seed: int, ranks: Ranks | None
) -> Loaded:
    transformers = import_transformers()
    check_attention(attn)
    config = preset_config(name)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    spread = spread_options(config, ranks)
    # On the device from the start: 8 billion random numbers take minutes on a CPU.
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        try:
            if spread:
                model = create_spread(config, dtype, attn, spread)
            else:
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attn, trust_remote_code=False
                )
        except (ValueError, ImportError) as error:
            raise ValueError(f"attn: {attn} cannot be used here: {first_line(error)}") from error
    return Loaded(model.eval(), None, config, name, ranks)
