"""The subcommand `fastattn benchmark`: its flags, and which of them belong to generation and which to training."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..cli.arguments import DTYPES, add_adapter_path, add_dtype_and_device, add_trust_remote_code, numbers
from ..cli.generate import FUSED_OPS, add_fused_ops
from ..common.printable import printable
from . import output, results

if TYPE_CHECKING:
    from ..lm.parallel import Ranks

OPTIMIZERS = ("adamw", "sgd")

# What either benchmark takes, and the other refuses. None is "not given": the default is that of the settings.
GENERATION = ("generation_tokens", "prompt_lengths", "prefill_step_size", "fresh_lengths", "tp", "adapter_path")
TRAINING = ("warmup_steps", "variable_lengths", "optimizer", "gradient_checkpointing", "fused_loss")


def add_command(commands: Any) -> None:
    """Adds `benchmark` to the subcommands of an argparse parser."""
    text = (
        "Measure a language model's prefill and generation speed, or with --train its training speed, for one or more "
        "attention implementations."
    )
    parser = commands.add_parser("benchmark", help="tokens per second of a whole model", description=text)
    add = parser.add_argument
    add(
        "--model",
        help="a Hugging Face model directory, or a preset with random weights: tiny, llama-3.2-1b, "
        "llama-3.1-8b, gemma-2-2b (default: llama-3.1-8b with a GPU, tiny without)",
    )
    add("-p", "--prompt-tokens", type=int, default=512, metavar="N", help="length of the prompt (%(default)s)")
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="prompts at a time (%(default)s)")
    add("-n", "--num-trials", type=int, metavar="N", help="timed trials after one warmup (5)")
    add("--delay", type=float, default=0.0, metavar="SECONDS", help="rest before each trial (%(default)s)")
    add(
        "--attn",
        default="fastattn",
        metavar="NAMES",
        help="what to compare, separated by commas: fastattn, sdpa, eager or any other attention that transformers "
        "knows. When generating, fastattn is its own engine and fastattn-hf transformers' loop with it; NAME-static is "
        "transformers' static cache and compiled step (%(default)s)",
    )
    output.add_json(add)
    add_dtype_and_device(parser, None, "the model's own; for presets, and to train, bf16 on a GPU, fp32 on the CPU")
    add_adapter_path(parser)
    add_trust_remote_code(parser)
    add_fused_ops(add, "where it is installed, on a GPU; to train: off")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts and of a preset's weights (%(default)s)")

    add = parser.add_argument_group("generation").add_argument
    add("-g", "--generation-tokens", type=int, metavar="N", help="length of the completion (1024)")
    add("--prompt-lengths", type=numbers(2), metavar="LOW,HIGH", help="each prompt of a batch its own length (not -p)")
    add("--prefill-step-size", type=int, metavar="N", help="prompt tokens at a time (2048)")
    add(
        "--fresh-lengths",
        type=int,
        metavar="N",
        help="also time N prompt lengths that were not seen before, the first and the second time",
    )

    add(
        "--tp",
        action="store_true",
        default=None,
        help="tensor parallel: spread the model over the processes that torchrun started "
        "(torchrun --nproc-per-node N -m fastattn benchmark --tp ...)",
    )

    add = parser.add_argument_group("training").add_argument
    add(
        "--train",
        action="store_true",
        help="measure training steps instead: forward, backward and optimizer; "
        "-p is the length of the sequences, -n the number of timed steps (10)",
    )
    add("--variable-lengths", type=numbers(2), metavar="LOW,HIGH", help="each step its own length between these two")
    add("--warmup-steps", type=int, metavar="N", help="steps before those that are timed (3)")
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help="adamw or sgd (adamw); fused on a GPU")
    add(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="recompute each layer's forward in the backward, instead of keeping what it made",
    )
    add(
        "--fused-loss",
        action="store_true",
        default=None,
        help="with --fused-ops on: liger-kernel's loss too, which never holds all logits",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, or 1 when every implementation had to be given up.

    Raises ValueError for an option of the other benchmark, a file that cannot be written, or what the settings refuse.
    """
    mine, others = (TRAINING, GENERATION) if arguments.train else (GENERATION, TRAINING)
    for name in others:
        if getattr(arguments, name) is not None:
            where = "only without --train" if arguments.train else "only with --train"
            raise ValueError(f"--{name.replace('_', '-')}: {where}")
    if not arguments.tp:
        return _run(arguments, mine)
    from ..lm.parallel import join

    with join(arguments.device) as ranks:
        return _run(arguments, mine, ranks)


def _run(arguments: argparse.Namespace, mine: Iterable[str], ranks: Ranks | None = None) -> int:
    """mine: the options of this benchmark alone."""
    writes = arguments.json and (ranks is None or ranks.is_first)
    if writes:
        output.check([arguments.json], inputs=[arguments.model] if arguments.model else [])
    given: dict[str, Any] = {
        "prompt_tokens": arguments.prompt_tokens,
        "batch_size": arguments.batch_size,
        "delay": arguments.delay,
        "attn": tuple(name.strip() for name in arguments.attn.split(",")),
        "dtype": DTYPES[arguments.dtype] if arguments.dtype else None,
        "device": arguments.device,
        "fused_ops": FUSED_OPS[arguments.fused_ops],
        "seed": arguments.seed,
        "trust_remote_code": arguments.trust_remote_code,
        **{name: getattr(arguments, name) for name in ("num_trials", *mine) if getattr(arguments, name) is not None},
    }
    given.pop("tp", None)
    report = _train(arguments.model, given) if arguments.train else _generate(arguments.model, given, ranks)
    if len(report.results) > 1:
        print(f"\n{report.comparison()}", flush=True)
    if writes:
        program = ["fastattn"] if ranks is None else ["torchrun", f"--nproc-per-node={ranks.size}", "-m", "fastattn"]
        results.write_json(arguments.json, report.as_dict(shlex.join([*program, *arguments.argv])))
        print(printable(f"Wrote {arguments.json}"))
    return 1 if all(result.error for result in report.results) else 0


def _generate(name: str | None, given: dict[str, Any], ranks: Ranks | None) -> Any:
    from . import model
    from .loaded import default_model

    return model.run(model.Settings(name or default_model(), **given), ranks)


def _train(name: str | None, given: dict[str, Any]) -> Any:
    from . import train
    from .loaded import default_model

    return train.run(train.Settings(name or default_model(), **given))
