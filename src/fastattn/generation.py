"""`fastattn generate`: continues a prompt, and prints the text as it comes.

transformers' own `generate` does the work, so that sampling, stop tokens and caches are what its users know; attention
is fastattn's.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from .arguments import DTYPES, add_dtype_and_device


def add_command(commands: Any) -> None:
    """Adds `generate` to the subcommands of an argparse parser."""
    text = "Continue a prompt with a language model, printing the text as it comes. Without --temperature: greedily."
    parser = commands.add_parser("generate", help="continue a prompt", description=text)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face model directory, with its tokenizer")
    add("--prompt", required=True, metavar="TEXT", help="what to continue; - reads it from stdin")
    add("-g", "--generation-tokens", type=int, default=256, metavar="N", help="at most so many tokens (%(default)s)")
    add(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens at this temperature (0: take the best)"
    )
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have probability P")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (%(default)s)")
    add("--chat", action="store_true", help="put the prompt into the model's chat template, as a user's message")
    add("--attn", default="fastattn", metavar="NAME", help="attention implementation (%(default)s)")
    add_dtype_and_device(parser, None, "the model's own")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command: text on stdout, tokens per second on stderr. Returns the exit status.

    Raises ValueError for a model without a tokenizer, a prompt without tokens or beyond the model's length, or an
    option out of its range.
    """
    options = sampling(arguments)
    import torch
    from transformers import TextStreamer
    from transformers.utils import logging

    from .lm import load

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers draws one while loading, into log files too
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None
    _check_model(arguments.model)
    loaded = load(arguments.model, arguments.attn, dtype, arguments.device)
    ids = _encode(loaded, sys.stdin.read() if arguments.prompt == "-" else arguments.prompt, arguments.chat)
    limit = getattr(loaded.config, "max_position_embeddings", None) or 2**31
    count = min(arguments.generation_tokens, limit - ids.shape[1])
    if count < 1:
        raise ValueError(f"--prompt: expected fewer tokens than the model's {limit}, got {ids.shape[1]}")

    class Streamer(TextStreamer):
        """Prints text as it comes, and notes when."""

        def __init__(self, *rest: Any, **options: Any) -> None:
            super().__init__(*rest, **options)
            self.times: list[float] = []  #: of the prompt, then of each new token

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

    streamer = Streamer(loaded.tokenizer, skip_prompt=arguments.chat, skip_special_tokens=True)
    torch.manual_seed(arguments.seed)
    with torch.inference_mode():
        loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # one prompt, no padding
            max_new_tokens=count,
            pad_token_id=_padding(loaded),
            streamer=streamer,
            **options,
        )
    sys.stdout.flush()
    print(_speed(ids.shape[1], streamer.times), file=sys.stderr)
    return 0


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of transformers' `generate` that say how a token is chosen. Raises ValueError for bad ones."""
    if arguments.generation_tokens < 1:
        raise ValueError(f"--generation-tokens: expected at least 1, got {arguments.generation_tokens}")
    if not 0 <= arguments.temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0 or more, got {arguments.temperature}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p: expected a number in (0, 1], got {arguments.top_p}")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise ValueError(f"--top-k: expected at least 1, got {arguments.top_k}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed: expected 0 or more, got {arguments.seed}")
    if arguments.temperature == 0:
        if arguments.top_p is not None or arguments.top_k is not None:
            raise ValueError("--top-p and --top-k: only with --temperature above 0, which makes it draw")
        # None over what a model's generation_config.json may hold for drawing: generate would warn of it.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_p, top_k = arguments.top_p or 1.0, arguments.top_k or 0
    return {"do_sample": True, "temperature": arguments.temperature, "top_p": top_p, "top_k": top_k}


def _check_model(model: str) -> None:
    """Before a preset's 8 billion random numbers are made."""
    from pathlib import Path

    from .lm.presets import PRESETS

    if model in PRESETS and not Path(model).is_dir():
        raise ValueError(
            f"--model: the preset {model} has random weights and no tokenizer, so there is no text to generate: "
            "expected a Hugging Face model directory (fastattn benchmark takes presets)"
        )


def _encode(loaded: Any, prompt: str, chat: bool) -> Any:
    """The prompt's tokens, int64 `[1, P]` on the model's device."""
    import torch

    if chat:
        if not loaded.tokenizer.chat_template:
            raise ValueError("--chat: this model's tokenizer has no chat template")
        message = [{"role": "user", "content": prompt}]
        prompt = loaded.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # A template writes the special tokens itself.
    tokens = loaded.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not tokens:
        raise ValueError("--prompt: expected some text, this one has no tokens")
    return torch.tensor([tokens], device=loaded.model.device)


def _padding(loaded: Any) -> int | None:
    """Nothing is padded, but generate asks, and warns when it has to choose for itself."""
    if loaded.tokenizer.pad_token_id is not None:
        return int(loaded.tokenizer.pad_token_id)
    end = loaded.model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end


def _speed(prompt: int, times: list[float]) -> str:
    """Both phases in one line. times: of the prompt and of each new token; the first belongs to the prompt's time."""
    begin, first, *others = times
    parts = [f"prompt: {prompt} tokens, {prompt / (first - begin):.1f} tokens/s"]
    if others:
        parts.append(f"generation: {len(others) + 1} tokens, {len(others) / (others[-1] - first):.1f} tokens/s")
    else:
        parts.append("generation: 1 token")
    return "; ".join(parts)
