"""Checks the files of a model's directory before other libraries open them.

The files are untrusted. They are read as plain JSON and as safetensors headers: nothing is run, and no file outside of
the directory is opened. A missing, damaged or absurd file raises `Refused`, which names it.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.failures import Refused, blame, in_one_line

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Files that must be JSON objects if they exist. transformers silently ignores some of them if they are damaged.
OBJECTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_LARGEST = 1 << 28  #: bytes of a JSON file
_MOST_LAYERS = 10_000  #: more than any model has; transformers makes lists of that length
#: Names of sizes in transformers that must be at least 1.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, as the header describes it."""

    file: Path
    dtype: str  #: as safetensors writes it: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]


def check_config(path: Path) -> dict[str, Any]:
    """The content of config.json, after a check of it and of the other JSON files of the directory.

    Raises ValueError, naming the file, for one that is missing, no regular file, no JSON object, or has impossible
    values.
    """
    for entry in sorted(path.iterdir()):
        _check_kind(entry)
        with suppress(OSError):  # no directory, or not readable
            for inner in sorted(entry.iterdir()):
                _check_kind(inner)
    if not (path / CONFIG).is_file():
        raise Refused(f"{path / CONFIG}: not found; expected a model directory in Hugging Face's layout")
    found = {name: read_json(path / name) for name in OBJECTS if (path / name).exists()}
    config = found[CONFIG]
    _check_numbers(path / CONFIG, config)
    if "transformers_weights" in config:  # another file for the weights, which would not be checked here
        raise Refused(f"{path / CONFIG}: transformers_weights: expected the weights in {WHOLE} or listed by {INDEX}")
    _check_end_tokens(path, found.get("generation_config.json", {}))
    return config


def brings_code(path: Path) -> bool:
    """Whether the directory's config or tokenizer names classes whose source is in the directory."""
    names = (CONFIG, "tokenizer_config.json")
    return any(bool(read_json(path / name).get("auto_map")) for name in names if (path / name).is_file())


def check_sizes(path: Path, config: Any) -> None:
    """Raises ValueError for a config whose sizes are not whole numbers above 0, or whose heads do not divide.

    config: transformers' config of the text part. Only entries of config.json are checked, because some of
    transformers' defaults are 0 or -1 for "none".
    """
    file, raw = path / CONFIG, read_json(path / CONFIG)
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict) and "model_type" in part)]
    entries = next((part for part in parts if part.get("model_type") == config.model_type), raw)
    sizes: dict[str, int] = {}
    for name in _SIZES:
        key = config.attribute_map.get(name, name)
        value = entries.get(key, entries.get(name))
        for one in value if isinstance(value, list) else [value]:
            if one is None:
                continue
            if isinstance(one, bool) or not isinstance(one, int) or one < 1:
                raise Refused(f"{file}: {key}: expected a whole number above 0, got {json.dumps(one)[:60]}")
            sizes[name] = one
    heads, kv_heads = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads and not isinstance(entries.get("num_key_value_heads"), list):
        raise Refused(
            f"{file}: num_key_value_heads: expected a number that divides the {heads} attention heads, got {kv_heads}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file that must be a JSON object. Raises ValueError, naming it, if it is not."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: expected a JSON file: {in_one_line(error)}") from error
    if not isinstance(found, dict):
        raise Refused(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _check_kind(entry: Path) -> None:
    """Raises ValueError for a pipe or a device, because opening it may block forever."""
    try:
        kind = entry.stat().st_mode
    except OSError:
        return  # a dangling link: reported as missing if it is needed
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise Refused(f"{entry}: expected a regular file, this is a pipe, a socket or a device")


def _check_numbers(file: Path, config: dict[str, Any]) -> None:
    """Raises ValueError for NaN, and for a number of layers that transformers would allocate lists for."""
    for key, value in _items(config):
        if isinstance(value, float) and math.isnan(value):
            raise Refused(f"{file}: {key}: expected a number, got NaN")
        if isinstance(value, int) and "layer" in key and value > _MOST_LAYERS:
            raise Refused(f"{file}: {key}: expected at most {_MOST_LAYERS}, got {value}")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a JSON value, each with the nearest key above it."""
    queue = [(key, value)]
    while queue:
        key, value = queue.pop()
        if isinstance(value, dict):
            queue += value.items()
        elif isinstance(value, list):
            queue += [(key, item) for item in value]
        else:
            yield key, value


def _check_end_tokens(path: Path, generation: dict[str, Any]) -> None:
    """Raises ValueError unless eos_token_id is one or several token ids."""
    end = generation.get("eos_token_id")
    for token in end if isinstance(end, list) else [end]:
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise Refused(
                f"{path / 'generation_config.json'}: eos_token_id: expected token ids, got {json.dumps(token)[:60]}"
            )


def read_headers(path: Path) -> dict[str, Stored]:
    """The tensors in a model's directory, by name. Reads headers only.

    Raises ValueError, naming the file, unless all safetensors files are undamaged and within the directory, and an
    index of several files is right.
    """
    whole, index = path / WHOLE, path / INDEX
    named: dict[str, str] = {}
    if index.exists():
        named = read_json(index).get("weight_map")  # type: ignore[assignment]
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise Refused(f"{index}: expected a weight_map that names the safetensors files")
    # If both exist, transformers reads the whole file and ignores the index.
    if whole.exists() or not named:
        return _header(path, whole)
    found: dict[str, Stored] = {}
    for name in sorted(set(named.values())):
        if Path(name).suffix != ".safetensors":
            raise Refused(f"{index}: expected names of safetensors files, got {name!r}")
        for tensor, stored in _header(path, path / name).items():
            if tensor in found:
                raise Refused(f"{stored.file}: {tensor} is in {found[tensor].file.name} as well")
            found[tensor] = stored
    for tensor, name in sorted(named.items()):
        if tensor not in found or found[tensor].file != path / name:
            raise Refused(f"{index}: says that {tensor} is in {name}, where it is not")
    return found


def _header(path: Path, file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    _check_inside(path, file)
    if not file.is_file():
        raise Refused(f"{file}: not found; expected the weights as safetensors")
    with blame(f"{file}: expected a whole safetensors file, this one is damaged"):
        with safe_open(str(file), framework="pt") as opened:  # compares the header with the file's size
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            return {name: Stored(file, str(x.get_dtype()), tuple(x.get_shape())) for name, x in slices.items()}


def _check_inside(path: Path, file: Path) -> None:
    """Raises ValueError for a file outside of the directory, which a name in an index or a link could point to. Links
    of the Hub's cache point to its blobs."""
    real, home = file.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        allowed.append(Path(HF_HUB_CACHE).resolve())
    except ImportError:
        pass
    inside = file.is_relative_to(path) and ".." not in file.parts[len(path.parts) :]
    if not inside or not any(real.is_relative_to(folder) for folder in allowed):
        raise Refused(f"{file}: expected weights within the directory {path}, this is outside of it")
