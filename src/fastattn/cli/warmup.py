"""`fastattn warmup`: builds a model's kernels and plans ahead of time."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import DTYPES, add_dtype_and_device, add_trust_remote_code, numbers


def add_command(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    text = (
        "Build every kernel and plan that a model needs, and keep what can be kept on disk. Only the model's config is "
        "read. Exit status 1: something is slower here than it need be, or could not be made ready."
    )
    parser = commands.add_parser("warmup", help="build a model's kernels and plans ahead", description=text)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face model directory, or tiny, llama-3.2-1b, llama-3.1-8b")
    add(
        "--batch-sizes",
        type=numbers(),
        default=(1,),
        metavar="N,N",
        help="sequences at a time, separated by commas; powers of two stand for those below (1)",
    )
    add("--max-length", type=int, default=8192, metavar="N", help="tokens of the longest sequence (%(default)s)")
    add("--training", action="store_true", help="training as well")
    add_dtype_and_device(parser, None, "the model's own")
    add_trust_remote_code(parser)
    add("--no-progress", action="store_true", help="only the report")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Warms up and prints the report. Returns the exit status."""
    import torch

    from ..warming.model import warmup_model

    report = warmup_model(
        arguments.model,
        batch_sizes=arguments.batch_sizes,
        max_length=arguments.max_length,
        training=arguments.training,
        dtype=getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else None,
        device=arguments.device,
        progress=not arguments.no_progress,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(report, flush=True)
    return 0 if report.complete else 1
