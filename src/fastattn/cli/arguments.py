"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

#: A dtype's name on the command line -> torch's name for it.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"} | {n: n for n in ("bfloat16", "float16", "float32")}


def add_dtype_and_device(parser: argparse.ArgumentParser, default: str | None, text: str) -> None:
    """Adds `--dtype`, one of `DTYPES`, and `--device`. text: how --help describes the default dtype."""
    parser.add_argument("--dtype", choices=DTYPES, default=default, metavar="DTYPE", help=f"bf16, fp16, fp32 ({text})")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (a GPU if there is one)")


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust-remote-code`, for commands that load a model's directory."""
    text = "run code that the model's directory brings, where transformers has none of its own (default: refuse)"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def add_adapter_path(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter-path`, for commands that load a model to generate with it."""
    text = "merge this adapter, of peft's layout, into the model's weights (default: the one beside the model, if any)"
    parser.add_argument("--adapter-path", metavar="DIR", help=text)


def numbers(count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: `count` whole numbers (None: one or more), separated by commas."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != count if count else not found:
            many = f"{count} whole" if count else "whole"
            raise argparse.ArgumentTypeError(f"expected {many} numbers separated by commas, got {text!r}")
        return found

    return parse


def path_of(text: str) -> str:
    """An argparse type: the name of a file or a directory. (`--json "$FILE"` without a FILE would write nowhere.)"""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return text


def add_json(add: Callable[..., Any]) -> None:
    """`--json`. add: a parser's `add_argument`."""
    add("--json", type=path_of, metavar="FILE", help="write all figures and the environment to FILE")
