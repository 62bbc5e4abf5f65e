"""Reads config, tokenizer and model of a directory through transformers. Only this module passes untrusted files to it.

Errors of transformers become one line that names the directory or the file. No code of the directory is run unless the
caller trusts it, nothing is downloaded, no pickle is opened, and the user is not prompted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..._compat.transformers import has_adapter
from ...common.failures import Refused, blame
from .adapters import ELSEWHERE
from .directory import CONFIG, Stored, brings_code, check_config, check_sizes
from .weight_checks import check_dtypes, check_finite, check_loaded, check_runs, create_on_meta


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """transformers' config of a directory. Raises ValueError, naming the file, for one that it cannot read."""
    from transformers import AutoConfig

    with blame(f"{path}: cannot be loaded"):
        check_config(path)
    with _code_refused(path, trust_remote_code):
        with blame(f"{path / CONFIG}: expected the config of a model transformers knows"), _quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
            check_sizes(path, config.get_text_config())
    return config


def read_tokenizer(path: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer. Raises ValueError unless it turns a text into tokens and back."""
    from transformers import AutoTokenizer

    file = path / "tokenizer.json"
    expected = f"{file if file.is_file() else path}: expected a tokenizer (tokenizer.json or the like)"
    with _code_refused(path, trust_remote_code), blame(expected), _quiet():
        found = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
        names = getattr(found, "vocab_files_names", None) or {}  # some tokenizers need no file
        if names and not any((path / name).is_file() for name in names.values()):
            raise TypeError("it has none of its files")  # transformers 5.4 then returns one without a vocabulary
        ids = found("a b")["input_ids"]
        if not isinstance(found.decode(ids), str) or isinstance(found.model_max_length, bool | str):
            raise TypeError("its settings are not of the right types")
        templates = found.chat_template or ""
        for text in templates.values() if isinstance(templates, dict) else [templates]:
            if not isinstance(text, str):
                raise TypeError(f"chat_template: expected a text, got {type(text).__name__}")
    return found


def check_vocabulary(path: Path, tokenizer: Any, rows: int) -> None:
    """Raises ValueError when the tokenizer's own vocabulary is larger than the model's embedding has rows.

    Added tokens may lie beyond it, such as image tokens in a model without images. Prompts with such tokens are
    refused.
    """
    if tokenizer.vocab_size > rows:
        raise Refused(
            f"{path}: expected a tokenizer with at most as many tokens as the model's embedding has rows, "
            f"got {tokenizer.vocab_size} and {rows}"
        )


def read_model(
    path: Path,
    config: Any,
    stored: dict[str, Stored],
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    **options: Any,
) -> Any:
    """The directory's causal language model in eval mode. All its weights are from the files, and finite.

    stored: from `read_headers`. device: of the model; None: the one that transformers chooses. options: for
    transformers' from_pretrained.
    """
    from transformers import AutoModelForCausalLM

    with _code_refused(path, trust_remote_code), _quiet():
        meta_model = create_on_meta(path, config, stored, trust_remote_code)
    with blame(f"{path}: cannot be loaded as a causal language model"), _quiet() as log:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),  # transformers 5.4 calls functions with it that take no Path
                config=config,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # never a pickle
                adapter_kwargs=dict(ELSEWHERE),
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                **options,
            )
        except RuntimeError as error:
            if found := re.search(r"(\S+)\s*\|\s*\S*CONVERSION", "\n".join(log)):  # the error itself names no tensor
                raise Refused(f"{path}: {_plain(found[1])}: the files' tensors do not fit the config") from error
            raise
        if has_adapter(model):
            raise Refused(
                f"{path}: this transformers applies the adapter beside the model by itself: move it elsewhere"
            )
        model = (model if device is None else model.to(device)).eval()
        if not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None:
            check_dtypes(meta_model, stored)
            if getattr(model.config, "quantization_config", None) is not None:  # transformers only warns
                raise Refused(f"{path / CONFIG}: quantization_config: expected a kind that transformers knows")
        check_loaded(path, model, info, stored, part=type(model.config) is not type(config))
        check_finite(path, model, stored)
        check_runs(path, model, rows_of(meta_model))
    return model


def rows_of(model: Any) -> int:
    """The number of rows of a model's embedding."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


@contextmanager
def _code_refused(path: Path, trust_remote_code: bool) -> Iterator[None]:
    """Explains a failure within the block if the directory has code that was not run."""
    try:
        yield
    except ValueError as error:
        if trust_remote_code or not brings_code(path):
            raise
        raise Refused(
            f"{path}: cannot be loaded without code of its own, which is not run unless you trust it: "
            "--trust-remote-code, trust_remote_code=True"
        ) from error


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collects the log of transformers within the block instead of printing it: errors report what matters.

    With TRANSFORMERS_VERBOSITY set it is printed as well.
    """
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, collector = logging.getLogger("transformers"), Collector()
    handlers = list(logger.handlers)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        for handler in handlers:
            logger.removeHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate
        for handler in handlers:
            if handler not in logger.handlers:
                logger.addHandler(handler)


def _plain(text: str) -> str:
    """The text without the colour codes of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
