"""Load a causal language model: a Hugging Face directory, or a preset with random weights."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._compat.transformers import attention_name, causal_class, distributed
from ..common.failures import Refused, blame
from .adapters import apply_adapter, find_adapter
from .directory import read_headers
from .fused_ops import check_fused_ops
from .presets import PRESETS, preset_config
from .pretrained import check_vocabulary, read_config, read_model, read_tokenizer, rows_of
from .probe import Probe

if TYPE_CHECKING:
    from .parallel import Ranks


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference."""

    model: Any  #: transformers' PreTrainedModel, in eval mode
    tokenizer: Any | None  #: None for presets
    config: Any  #: transformers' PretrainedConfig of the text part
    name: str  #: the preset's name, or the directory's
    ranks: Ranks | None = None  #: that run it together (tensor parallel); None: this process alone
    fused_ops: bool | None = None  #: whether liger-kernel's operations are used, see `load`


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
            weights: "tiny", "llama-3.2-1b", "llama-3.1-8b", "gemma-2-2b". A directory of that name goes before.
        attn: the attention implementation, see `set_attention`.
        dtype: of the weights. Default: a directory's own; for presets bfloat16 on a GPU, float32 on the CPU.
        device: default: the current GPU if there is one, else the CPU.
        seed: of a preset's weights.
        ranks: spread the model over them, as its tensor parallel plan in transformers says: each holds its part of the
            weights, on its own device. A preset's weights are others then. See `fastattn.lm.parallel.join`.
        fused_ops: whether liger-kernel's norms, rotary embeddings and activations take the place of transformers' own
            while a runner or an engine runs the model through transformers' modules; the model itself is not changed.
            None: on a GPU, where liger-kernel is installed. True: it is required. False: never.
        trust_remote_code: whether code that comes with the directory may be run. Without, a model that cannot be had
            from transformers' own classes is refused.
        adapter_path: a directory with an adapter that peft wrote: adapter_config.json, adapter_model.safetensors. It is
            merged into the weights. Default: the one beside the model, if it has one.

    Raises:
        ValueError: there is no such model, or it is incomplete or damaged: the text, one line, names the path and what
            was expected there. Weights of other shapes than the config says, that it does not know, or that are NaN or
            infinite count as damaged. The device or the attention implementation is not available. The model has no
            tensor parallel plan, or heads that the ranks do not divide. `fused_ops` without a GPU, or with `ranks`.
            It is no causal language model (see `probe.Probe`). The adapter does not fit, or cannot be merged.
        ImportError: transformers is not installed, or too old for `ranks`; or liger-kernel is not, for `fused_ops`; or
            peft is not, for an adapter.
    """
    _transformers()
    place = pick_device(device) if ranks is None else ranks.device
    if fused_ops:
        if ranks is not None:
            raise ValueError("fused_ops: cannot be used with a model that is spread over ranks")
        check_fused_ops(place)
    path = Path(model)
    is_directory = os.path.isdir(model)  # False as well where it cannot be told
    adapter = find_adapter(path if is_directory else None, adapter_path)
    if adapter is not None and ranks is not None:
        raise ValueError("adapter_path: cannot be used with a model that is spread over ranks")
    if is_directory:
        loaded = _load_directory(path, attn, dtype, place, ranks, trust_remote_code)
    elif str(model) in PRESETS:
        loaded = _create(str(model), attn, dtype, place, seed, ranks)
    else:
        raise ValueError(
            f"model: expected a directory with config.json, *.safetensors and a tokenizer, "
            f"or one of the presets {', '.join(PRESETS)}, got {str(model)!r}"
        )
    if adapter is not None:
        loaded = replace(loaded, model=apply_adapter(loaded.model, adapter))
    if is_directory and ranks is None:
        Probe(loaded.model)  # before anybody waits for its first token
    return replace(loaded, fused_ops=fused_ops)


def set_attention(model: Any, attn: str) -> None:
    """Switches the attention implementation of a loaded model; the weights stay.

    attn: "fastattn", or any name transformers knows: "sdpa", "eager", "flash_attention_2", ...

    Raises ValueError when the implementation is unknown, not installed, or not supported by the model.
    """
    check_attention(attn)
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn: {attn} cannot be used here: {_line(error)}") from error
    if attention_name(model.config) != attn:  # transformers only warns when a model cannot switch
        raise ValueError(f"attn: {type(model).__name__} does not support {attn}")


def check_attention(attn: str) -> None:
    """Raises ValueError unless transformers knows the attention implementation. Registers "fastattn" if it is that."""
    transformers = _transformers()
    if attn == "fastattn":
        from ..integrations import transformers as hf  # noqa: F401  (importing it registers the name)
    known = {"eager", "fastattn", *transformers.AttentionInterface().valid_keys()}
    if attn not in known:
        common = [name for name in sorted(known) if not name.startswith("paged")]
        raise ValueError(f"attn: expected one of {', '.join(common)}, got {attn!r}")


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device named, or the current GPU if there is one, else the CPU. ValueError unless it exists."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(f"device: got {str(device)!r}, but torch sees {count} GPUs here")
    return found


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
    spread = _spread(config, ranks, trust_remote_code)
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
    transformers = _transformers()
    check_attention(attn)
    config = preset_config(name)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    spread = _spread(config, ranks)
    # On the device from the start: 8 billion random numbers take minutes on a CPU.
    with torch.random.fork_rng(devices=gpus), torch.device(device):
        torch.manual_seed(seed)
        try:
            if spread:
                model = _create_spread(config, dtype, attn, spread)
            else:
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attn, trust_remote_code=False
                )
        except (ValueError, ImportError) as error:
            raise ValueError(f"attn: {attn} cannot be used here: {_line(error)}") from error
    return Loaded(model.eval(), None, config, name, ranks)


def _spread(config: Any, ranks: Ranks | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """What makes `from_pretrained` spread a model over the ranks. Nothing where one holds it whole."""
    if ranks is None or ranks.size == 1:
        return {}
    transformers = _transformers()
    how = distributed(ranks.size)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(f"model: expected a causal language model: {_line(error)}") from error
    if not model.base_model.tp_plan:
        raise ValueError(f"tp: {type(model).__name__} has no tensor parallel plan in transformers")
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks.size or kv_heads % ranks.size:
        raise ValueError(
            f"tp: expected a number of ranks that divides the model's {heads} heads and {kv_heads} K/V heads, "
            f"got {ranks.size}"
        )
    return {"distributed_config": how}


def _create_spread(config: Any, dtype: torch.dtype, attn: str, spread: dict[str, Any]) -> Any:
    """A preset of which each rank makes its part alone: transformers fills in what a checkpoint does not have, here
    everything."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists all that is missing
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)  # the seed alone is lost on CPUs
            options = {"dtype": dtype, "attn_implementation": attn, **spread}
            kind = causal_class(config)  # the Auto class itself wants a name or a path
            return kind.from_pretrained(None, config=config, state_dict={}, **options)
    finally:
        logging.set_verbosity(verbosity)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"fastattn.lm needs transformers: pip install 'fastattn[hf]' ({_line(error)})") from error
    return transformers


def _line(error: BaseException) -> str:
    """The first line of an exception's text: transformers' often run over many."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
