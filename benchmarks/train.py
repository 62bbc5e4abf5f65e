"""Tokens per second of training steps, for one or more attention implementations:

    python -m benchmarks.train --model llama-3.2-1b -p 2048 -b 4 --attn fastattn,sdpa --json FILE

A step is forward, backward and optimizer on one batch of random tokens, whose labels are the tokens themselves: the
model shifts them. tokens_per_second counts the batch's tokens; peak_memory is as in `fastattn benchmark`.

The implementations take turns step by step on one model: the same batches, and the same weights, because the learning
rate is 0. AdamW or SGD then do all of their work and change nothing. So any model is held once, however many
implementations there are, and their losses and gradients have to agree in every step.
"""

from __future__ import annotations

import random
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn._compat.transformers import enable_checkpointing
from fastattn.bench import output, results
from fastattn.bench.loaded import (
    CommonSettings,
    Progress,
    clock,
    counted,
    default_model,
    describe,
    dtype_text,
    identity,
    open_model,
    peak_memory,
    progress,
    release,
    served_by,
)  # fmt: skip
from fastattn.bench.timing import wait_for_compilers
from fastattn.cli.arguments import DTYPES, add_dtype_and_device, add_trust_remote_code, numbers
from fastattn.cli.generate import FUSED_OPS, add_fused_ops
from fastattn.lm import Loaded, set_attention
from fastattn.lm.fused_ops import FusedOps, find_fused_ops
from fastattn.lm.loading.device import pick_device
from fastattn.lm.loading.loaded import max_length as longest

from .command import end, parser_of
from .train_report import Report, Result, Step

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Settings(CommonSettings):
    """What to measure: timed steps are its trials. None as dtype: bfloat16 on a GPU, else as in `fastattn.lm.load`."""

    num_trials: int = 10
    warmup_steps: int = 3
    variable_lengths: tuple[int, int] | None = None  #: least and most tokens: each step its own length
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    fused_loss: bool = False  #: with fused_ops (of which None is False here): a loss that never holds all logits

    counts = (*CommonSettings.counts, "warmup_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.fused_loss and not self.fused_ops:
            raise ValueError("fused_loss: only with fused_ops")
        if self.prompt_tokens < 2:
            raise ValueError(f"prompt_tokens: expected at least 2 to train on, got {self.prompt_tokens}")
        if self.variable_lengths is not None:
            low, high = self.variable_lengths
            steps = self.warmup_steps + self.num_trials
            if low < 2 or high - low + 1 < steps:
                raise ValueError(
                    f"variable_lengths: expected LOW,HIGH from 2 on with a length for each of {steps} steps, "
                    f"got {low},{high}"
                )


def run(settings: Settings) -> Report:
    """Loads the model once, then measures the implementations in turns: the first step of each, the second, ...

    Who goes first changes from step to step, because whoever meets a length first also pays for what belongs to none:
    the allocator's and cuBLAS's part. Prints as it goes; a progress bar appears on a terminal. An implementation that
    runs out of memory is reported and passed over. Raises ValueError before anything runs when the model, the device or
    an implementation is not usable.
    """
    dtype = settings.dtype or ("bfloat16" if pick_device(settings.device).type == "cuda" else None)
    loaded = open_model(settings, settings.attn, getattr(torch, dtype) if dtype else None)
    lengths = step_lengths(settings)
    limit = longest(loaded)
    if max(lengths) > limit:
        field = "variable_lengths" if settings.variable_lengths else "prompt_tokens"
        raise ValueError(f"{field}: expected at most the model's {limit}, got {max(lengths)}")
    _prepare(loaded, settings.gradient_checkpointing)
    ops = find_fused_ops(loaded.model, settings.fused_loss) if settings.fused_ops else FusedOps()

    results = [Result(name) for name in settings.attn]
    with progress(len(results) * len(lengths), "step", len(results) > 1) as shown:
        shown.say(describe(loaded))
        if ops.replaced:
            shown.say("Fused by liger-kernel, in fastattn's steps: " + ", ".join(ops.replaced))
        _measure(loaded, results, lengths, settings, ops, shown)
        used: dict[str, Any] = {"dtype": dtype_text(loaded.model.dtype), "device": str(loaded.model.device)}
        used["fused_ops"] = list(ops.replaced)
        report = Report(asdict(settings) | used, identity(loaded), results)
        for result in results:
            if result.error is None:
                shown.say(f"All steps: {result.summary()}", result.attn)
            if result.calls:
                shown.say(served_by(result), result.attn)
        for line in report.disagreements():
            shown.say(f"Warning: {line}")
    return report


def step_lengths(settings: Settings) -> list[int]:
    """Tokens of each step's sequences, warmup first: a function of the settings alone.

    Of variable lengths none comes twice. The warmup begins with the longest, so that the allocator need not grow in
    the timed steps.
    """
    steps = settings.warmup_steps + settings.num_trials
    if settings.variable_lengths is None:
        return [settings.prompt_tokens] * steps
    low, high = settings.variable_lengths
    return [high, *random.Random(settings.seed).sample(range(low, high), steps - 1)]


def _prepare(loaded: Loaded, checkpointing: bool) -> None:
    """Brings a model loaded for inference into training."""
    model = loaded.model
    model.train()
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing: {type(model).__name__} does not support it")
        enable_checkpointing(model)


def _optimizer(model: torch.nn.Module, name: str, device: torch.device) -> torch.optim.Optimizer:
    kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    # None leaves the choice to torch; on a GPU fused is the fastest, and what one trains with.
    found: torch.optim.Optimizer = kind(model.parameters(), lr=0.0, fused=True if device.type == "cuda" else None)
    return found


def _measure(
    loaded: Loaded,
    results: list[Result],
    lengths: list[int],
    settings: Settings,
    ops: FusedOps,
    shown: Progress,
) -> None:
    """Fills the results. ops: of fastattn's steps."""
    optimizer = _optimizer(loaded.model, settings.optimizer, loaded.model.device)
    shown.say("Running warmup..")
    for i, length in enumerate(lengths):
        number = i - settings.warmup_steps + 1  # of the timed steps, from 1
        if i == 1:  # what the first step has asked for serves the others
            wait_for_compilers()
        if number == 1:
            shown.say(_announcement(settings))
        first = i % len(results)
        for result in (*results[first:], *results[:first]):
            if result.error is not None:
                continue
            set_attention(loaded.model, result.attn)
            time.sleep(settings.delay)
            step = None
            with suppress(torch.OutOfMemoryError), counted(result), ops if result.attn == "fastattn" else FusedOps():
                step = _step(loaded, optimizer, _tokens(loaded, settings, length, i), last=i == len(lengths) - 1)
            if step is None:  # by now the exception is gone, and with it what its frames held
                result.error = "out of memory"
                shown.say(f"{result.attn}: {result.error}, given up", result.attn)
                optimizer.zero_grad()
                release()
                continue
            shown.advance()
            if number >= 1:
                result.steps.append(step)
                shown.say(f"Step {number}:  {step}", result.attn)


def _step(loaded: Loaded, optimizer: torch.optim.Optimizer, ids: Tensor, last: bool) -> Step:
    """One step of training on ids `[B, S]`. last: with the norm of its gradients, which is not timed."""
    device = loaded.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = clock(device)
    loss = loaded.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    seconds = clock(device) - begin
    memory = peak_memory(device)
    norm = _norm(loaded.model) if last else None
    optimizer.zero_grad()  # sets them to None: the next one starts from as much memory as this one
    return Step(ids.shape[1], ids.numel() / seconds, seconds, loss.item(), memory / 1e9, norm)


def _norm(model: torch.nn.Module) -> float:
    """The norm of all gradients, summed in fp32."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm().item()


def _tokens(loaded: Loaded, settings: Settings, length: int, number: int) -> Tensor:
    """Random tokens `[B, length]`: a function of the settings, the length and the step's number alone."""
    generator = torch.Generator().manual_seed(random.Random(f"{settings.seed} {length} {number}").getrandbits(63))
    ids = torch.randint(loaded.config.vocab_size, (settings.batch_size, length), generator=generator)
    return ids.to(loaded.model.device)


def _announcement(settings: Settings) -> str:
    low_high = settings.variable_lengths
    length = (
        f"prompt_tokens={settings.prompt_tokens}" if low_high is None else f"lengths={low_high[0]} to {low_high[1]}"
    )
    checkpointing = ", gradient checkpointing" if settings.gradient_checkpointing else ""
    return f"Timing training with {length}, batch_size={settings.batch_size}, {settings.optimizer}{checkpointing}."


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 when every implementation had to be given up.

    Raises ValueError for a file that cannot be written, or what the settings refuse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("train", __doc__)
    add = parser.add_argument
    add("--model", help="a Hugging Face model directory, or a preset with random weights (as fastattn benchmark)")
    add("-p", "--prompt-tokens", type=int, default=512, metavar="N", help="length of the sequences (%(default)s)")
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="sequences at a time (%(default)s)")
    add("-n", "--num-trials", type=int, default=10, metavar="N", help="timed steps (%(default)s)")
    add("--warmup-steps", type=int, default=3, metavar="N", help="steps before those that are timed (%(default)s)")
    add("--variable-lengths", type=numbers(2), metavar="LOW,HIGH", help="each step its own length between these two")
    add("--delay", type=float, default=0.0, metavar="SECONDS", help="rest before each step (%(default)s)")
    add("--attn", default="fastattn", metavar="NAMES", help="what to compare, separated by commas (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="fused on a GPU (%(default)s)")
    text = "recompute each layer's forward in the backward, instead of keeping what it made"
    add("--gradient-checkpointing", action="store_true", help=text)
    text = "with --fused-ops on: liger-kernel's loss too, which never holds all logits"
    add("--fused-loss", action="store_true", help=text)
    add_fused_ops(add, "off")
    add_dtype_and_device(parser, None, "bf16 on a GPU, else the model's own")
    add_trust_remote_code(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the tokens and of a preset's weights (%(default)s)")
    given = vars(parser.parse_args(argv))

    file, name = given.pop("json"), given.pop("model")
    if file:
        output.check([file], inputs=[name] if name else [])
    given["attn"] = tuple(part.strip() for part in given["attn"].split(","))
    given["dtype"] = DTYPES[given["dtype"]] if given["dtype"] else None
    given["fused_ops"] = FUSED_OPS[given["fused_ops"]]
    report = run(Settings(name or default_model(), **given))
    if len(report.results) > 1:
        print(f"\n{report.comparison()}", flush=True)
    if file:
        results.write_json(file, report.as_dict(f"python -m benchmarks.train {shlex.join(argv)}"))
        print(f"Wrote {file}")
    return 1 if all(result.error for result in report.results) else 0


if __name__ == "__main__":
    end(main)
