"""`fastattn generate`: continues one prompt, streaming the text, or a file of prompts as a batch."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DTYPES, add_adapter_path, add_dtype_and_device, add_trust_remote_code
from .terminal import argument_text, standard_input, stopped_by

if TYPE_CHECKING:
    from ..lm.parallel import Ranks

BOM = "\ufeff"  #: byte order mark that some editors and shells write before a text
#: --fused-ops -> `fused_ops` of `lm.load`.
FUSED_OPS = {"auto": None, "on": True, "off": False}


def add_command(commands: Any) -> None:
    """Adds `generate` to the subcommands of an argparse parser."""
    text = "Continue a prompt with a language model, printing the text as it comes. Without --temperature: greedily."
    parser = commands.add_parser("generate", help="continue a prompt", description=text)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face model directory, with its tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to continue; - reads it from stdin")
    what.add_argument("--prompts-file", metavar="FILE", help="a prompt on each line, to be continued as a batch")
    names = ("-g", "--max-tokens", "--generation-tokens")
    add(*names, type=int, default=256, metavar="N", help="at most so many tokens of each (%(default)s)")
    number = {"type": float, "metavar": "X"}
    add("--temperature", "--temp", default=0.0, **number, help="draw tokens at this temperature (0: take the best)")
    add("--top-p", **number, help="draw from the likeliest tokens that together have probability X")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--min-p", **number, help="draw from tokens with at least X times the best one's probability")
    add("--repetition-penalty", **number, help="above 1: tokens that were there before become less likely")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given repeatedly")
    add("--chat", action="store_true", help="put the prompt into the model's chat template, as a user's message")
    add("--batch-size", type=int, default=8, metavar="ROWS", help="prompts that run at a time (%(default)s)")
    add("--attn", default="fastattn", metavar="NAME", help="attention implementation (%(default)s)")
    add_fused_ops(add, "where it is installed, on a GPU")
    text = "tensor parallel: spread the model over the processes that torchrun started"
    add("--tp", action="store_true", help=f"{text} (torchrun --nproc-per-node N -m fastattn generate --tp ...)")
    add_dtype_and_device(parser, None, "the model's own")
    add_adapter_path(parser)
    add_trust_remote_code(parser)
    parser.set_defaults(run=run)


def add_fused_ops(add: Callable[..., Any], automatic: str) -> None:
    """Adds `--fused-ops`, one of `FUSED_OPS`. add: a parser's `add_argument`. automatic: when "auto" means "on"."""
    add(
        "--fused-ops",
        choices=FUSED_OPS,
        default="auto",
        metavar="WHEN",
        help="liger-kernel's norms, rotary embeddings and activations in models that run through transformers' own "
        f"modules: auto ({automatic}), on, off (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the text to stdout and speed and memory to stderr. Returns the exit status: 0, or `terminal.stopped_by`.

    Raises ValueError, naming the option, for a model without a tokenizer, a prompt without tokens or longer than the
    model allows, or an option out of its range.
    """
    try:
        return _run(arguments)
    except ValueError as error:
        raise ValueError(_name_option(str(error), arguments.prompts_file is None)) from error


def _run(arguments: argparse.Namespace) -> int:
    from ..lm.generation.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = {name: getattr(arguments, name) for name in names}
    Sampling(**sampling)  # raises before the model is loaded
    for name in ("max_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(arguments, name)}")
    _check_model(arguments.model)
    arguments.stop = [argument_text(text, "stop") for text in arguments.stop]
    if not arguments.tp:
        return _generate(arguments, _prompts(arguments), sampling)
    from ..lm.parallel import join

    with join(arguments.device) as ranks:
        prompts = ranks.from_first(lambda: _prompts(arguments))  # stdin reaches but one of them
        return _generate(arguments, prompts, sampling, ranks)


def _generate(
    arguments: argparse.Namespace, prompts: list[str], sampling: dict[str, Any], ranks: Ranks | None = None
) -> int:
    import torch
    from transformers import logging

    from ..lm import load
    from ..lm.generation.prompts import encode
    from ..lm.generation.results import Meter
    from ..lm.generation.stream import stream_batch

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers draws one while loading, into log files too
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None
    fused_ops = FUSED_OPS[arguments.fused_ops]
    loaded = load(
        arguments.model,
        arguments.attn,
        dtype,
        arguments.device,
        ranks=ranks,
        fused_ops=fused_ops,
        trust_remote_code=arguments.trust_remote_code,
        adapter_path=arguments.adapter_path,
    )
    one = arguments.prompt is not None
    ids = [
        encode(loaded, prompt, chat=arguments.chat, name="prompt" if one else f"prompts[{i}]")
        for i, prompt in enumerate(prompts)
    ]
    pieces = stream_batch(
        loaded,
        ids,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        batch_size=arguments.batch_size,
        **sampling,
    )
    printer = _Printer(["" if arguments.chat else prompt for prompt in prompts], headed=not one)
    meter, status = Meter(sum(map(len, ids))), 0
    try:
        with closing(pieces):
            for number, piece in pieces:
                meter.tick()
                printer.add(number, piece.text, piece.finish_reason is not None)
    except KeyboardInterrupt as stop:
        status = stopped_by(stop)
    printer.finish()
    print(meter.usage(loaded.model.device), file=sys.stderr)
    return status


class _Printer:
    """Prints texts in order: streams the first unfinished one and holds those behind it until their turn."""

    def __init__(self, prompts: list[str], headed: bool) -> None:
        """headed: print the text's number on a line before each text."""
        self._texts = prompts
        self._done = [False] * len(prompts)
        self._headed = headed
        self._turn = -1
        self._next()

    def add(self, number: int, text: str, done: bool) -> None:
        self._done[number] = done
        if number != self._turn:
            self._texts[number] += text
            return
        print(text, end="", flush=True)
        while self._turn < len(self._texts) and self._done[self._turn]:
            print(flush=True)
            self._next()

    def finish(self) -> None:
        """Prints what has come of unfinished texts."""
        while self._turn < len(self._texts):
            print(flush=True)
            self._next()

    def _next(self) -> None:
        self._turn += 1
        if self._turn < len(self._texts):
            if self._headed:
                print(f"==> {self._turn + 1} <==")
            print(self._texts[self._turn], end="", flush=True)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts_file is None:
        return [
            standard_input().removeprefix(BOM) if arguments.prompt == "-" else argument_text(arguments.prompt, "prompt")
        ]
    try:
        lines = Path(arguments.prompts_file).read_text(encoding="utf-8").removeprefix(BOM).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts_file: cannot be read: {error}") from error
    if not lines[-1]:
        lines.pop()  # the empty text after the last newline
    if not lines:
        raise ValueError(f"prompts_file: expected a prompt on each line, {arguments.prompts_file} is empty")
    return lines


def _check_model(model: str) -> None:
    """Raises ValueError for a preset, before its 8 billion random weights are made."""
    from ..lm.loading.presets import PRESETS

    if model in PRESETS and not os.path.isdir(model):
        raise ValueError(
            f"model: the preset {model} has random weights and no tokenizer, so there is no text to generate: "
            "expected a Hugging Face model directory (fastattn benchmark takes presets)"
        )


def _name_option(text: str, one: bool) -> str:
    """The message of an error, with the argument at its beginning renamed to the option on the command line."""
    if found := re.match(r"prompts\[(\d+)\]: ", text):
        name = "--prompt" if one else f"--prompts-file: line {int(found[1]) + 1}"
        return f"{name}: {text[found.end() :]}"
    return re.sub(r"^([a-z_]+)(?=: )", lambda found: "--" + found[1].replace("_", "-"), text)
