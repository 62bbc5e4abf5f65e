"""`fastattn benchmark`: tokens per second of a whole model."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ..common.printable import printable
from .arguments import DTYPES, add_adapter_path, add_dtype_and_device, add_json, add_trust_remote_code, numbers
from .generate import FUSED_OPS, add_fused_ops

if TYPE_CHECKING:
    from ..lm.parallel import Ranks


def add_command(commands: Any) -> None:
    """Adds `benchmark` to the subcommands of an argparse parser."""
    text = "Measure a language model's prefill and generation speed for one or more attention implementations."
    parser = commands.add_parser("benchmark", help="tokens per second of a whole model", description=text)
    add = parser.add_argument
    add(
        "--model",
        help="a Hugging Face model directory, or a preset with random weights: tiny, llama-3.2-1b, "
        "llama-3.1-8b, gemma-2-2b, gemma-4, gpt2 (default: llama-3.1-8b with a GPU, tiny without)",
    )
    add("-p", "--prompt-tokens", type=int, default=512, metavar="N", help="length of the prompt (%(default)s)")
    add("-g", "--generation-tokens", type=int, default=1024, metavar="N", help="length of the completion (%(default)s)")
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="prompts at a time (%(default)s)")
    add("-n", "--num-trials", type=int, default=5, metavar="N", help="timed trials after one warmup (%(default)s)")
    add("--delay", type=float, default=0.0, metavar="SECONDS", help="rest before each trial (%(default)s)")
    add(
        "--attn",
        default="fastattn",
        metavar="NAMES",
        help="what to compare, separated by commas: fastattn (its own engine), fastattn-hf (transformers' loop with "
        "it), sdpa, eager or any other attention that transformers knows, or NAME-static: transformers' static cache "
        "and compiled step (%(default)s)",
    )
    text = "each prompt of a batch has its own length (not -p)"
    add("--prompt-lengths", type=numbers(2), metavar="LOW,HIGH", help=text)
    text = "prompt tokens at a time (%(default)s)"
    add("--prefill-step-size", type=int, default=2048, metavar="N", help=text)
    text = "also time N prompt lengths that were not seen before, the first and the second time"
    add("--fresh-lengths", type=int, default=0, metavar="N", help=text)
    add(
        "--tp",
        action="store_true",
        help="tensor parallel: spread the model over the processes that torchrun started "
        "(torchrun --nproc-per-node N -m fastattn benchmark --tp ...)",
    )
    add_json(add)
    add_dtype_and_device(parser, None, "the model's own; for presets bf16 on a GPU, fp32 on the CPU")
    add_adapter_path(parser)
    add_trust_remote_code(parser)
    add_fused_ops(add, "where it is installed, on a GPU")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts and of a preset's weights (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, or 1 when every implementation had to be given up.

    Raises ValueError for a file that cannot be written, or what the settings refuse.
    """
    if not arguments.tp:
        return _run(arguments)
    from ..lm.parallel import join

    with join(arguments.device) as ranks:
        return _run(arguments, ranks)


#: Options that are settings of the benchmark by the same name.
_SAME = (
    "prompt_tokens", "generation_tokens", "batch_size", "num_trials", "delay", "prompt_lengths", "prefill_step_size",
    "fresh_lengths", "device", "seed", "trust_remote_code", "adapter_path",
)  # fmt: skip


def _run(arguments: argparse.Namespace, ranks: Ranks | None = None) -> int:
    from ..bench import model, output, results
    from ..bench.loaded import default_model

    writes = arguments.json and (ranks is None or ranks.is_first)
    if writes:
        output.check([arguments.json], inputs=[arguments.model] if arguments.model else [])
    settings = model.Settings(
        arguments.model or default_model(),
        attn=tuple(name.strip() for name in arguments.attn.split(",")),
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        fused_ops=FUSED_OPS[arguments.fused_ops],
        **{name: getattr(arguments, name) for name in _SAME},
    )
    report = model.run(settings, ranks)
    if len(report.results) > 1:
        print(f"\n{report.comparison()}", flush=True)
    if writes:
        program = ["fastattn"] if ranks is None else ["torchrun", f"--nproc-per-node={ranks.size}", "-m", "fastattn"]
        results.write_json(arguments.json, report.as_dict(shlex.join([*program, *arguments.argv])))
        print(printable(f"Wrote {arguments.json}"))
    return 1 if all(result.error for result in report.results) else 0
