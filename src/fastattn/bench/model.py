"""`fastattn benchmark`: tokens per second of a whole model, for one or more attention implementations.

Flags, lines and definitions are those of mlx_lm.benchmark, so that the two can be held against each other:

- prompt_tps: prompt tokens of the whole batch over the time until the first new tokens exist.
- generation_tps: the new tokens of the whole batch over the time after the first of them. (All of them, as mlx_lm
  counts, although the first was paid for in the prompt's time.)
- peak_memory: in 1e9 bytes. Of torch's CUDA allocator during the trial; on a CPU the process's peak, which only grows.

Prompts are random tokens, new ones for each trial and the same for each implementation. No token ends a generation.
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..lm import Loaded, generate_tokens, load, set_attention
from ..lm.load import check_attention
from .loaded import check_settings, clock, counted, describe, dtype_text, identity, peak_memory, release
from .report import KEYS, FreshLength, Report, Result, Trial


@dataclass(frozen=True)
class Settings:
    """What to measure. Raises ValueError, naming the field, for a value that makes no sense."""

    model: str
    prompt_tokens: int = 512
    generation_tokens: int = 1024
    batch_size: int = 1
    num_trials: int = 5
    prefill_step_size: int = 2048
    delay: float = 0.0  #: seconds to rest before each trial
    attn: tuple[str, ...] = ("fastattn",)
    fresh_lengths: int = 0  #: how many never-seen prompt lengths to time, per implementation
    dtype: str | None = None  #: one of `loaded.DTYPES`; None as in `fastattn.lm.load`
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("prompt_tokens", "generation_tokens", "batch_size", "num_trials", "prefill_step_size")
        check_settings(self, counts, ("delay", "fresh_lengths", "seed"))


def run(settings: Settings) -> Report:
    """Loads the model once, then measures the implementations turn by turn: warmups, first trials, second trials, ...

    Turn by turn, because a machine's speed drifts. Prints as it goes; a progress bar appears on a terminal. An
    implementation that runs out of memory is reported and passed over. Raises ValueError before anything runs when the
    model, the device or an implementation is not usable.
    """
    for name in settings.attn:
        check_attention(name)
    from tqdm import tqdm
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers draws one while loading, into log files too
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    loaded = load(settings.model, settings.attn[0], dtype, settings.device, settings.seed)
    for name in settings.attn[1:]:
        set_attention(loaded.model, name)
    limit = getattr(loaded.config, "max_position_embeddings", None) or 2**31
    longest = settings.prompt_tokens + settings.generation_tokens
    if longest > limit:
        raise ValueError(f"prompt_tokens + generation_tokens: expected at most the model's {limit}, got {longest}")
    lengths = fresh_lengths(settings, limit)

    total = len(settings.attn) * (1 + settings.num_trials + 2 * settings.fresh_lengths)
    results = [Result(name) for name in settings.attn]
    with tqdm(total=total, unit="run", leave=False, disable=None) as bar:

        def say(line: str) -> None:
            bar.write(line)
            sys.stdout.flush()  # a pipe gets each line when it is true, not at the end

        def speaker(name: str) -> Callable[[str], None]:
            return say if len(settings.attn) == 1 else lambda line: say(f"[{name}] {line}")

        say(describe(loaded))
        turns = [
            (result, _measure(loaded, result, own, settings, speaker(result.attn), bar.update))
            for result, own in zip(results, lengths)
        ]
        while turns:
            turns = [(result, steps) for result, steps in turns if _turn(loaded, result, steps)]
        for result in results:
            if result.calls:
                speaker(result.attn)("Served by: " + ", ".join(f"{key} {n}" for key, n in result.calls.items()))
    used = {"dtype": dtype_text(loaded.model.dtype), "device": str(loaded.model.device)}
    return Report(asdict(settings) | used, identity(loaded), results)


def fresh_lengths(settings: Settings, limit: int) -> list[list[int]]:
    """Prompt lengths near prompt_tokens that nothing in the process has met: a list for each implementation.

    No length appears twice, in any list: what one implementation compiles or plans must not serve another. They lie
    below prompt_tokens, and only when there are not enough of them above all that the generation reaches, because a
    decode step meets every length between. Lengths whose steps would all have the common size are left out.
    """
    p, count = settings.prompt_tokens, settings.fresh_lengths * len(settings.attn)
    if not count:
        return [[] for _ in settings.attn]
    step = settings.prefill_step_size
    spread = max(2 * count, p // 8)
    # The last token goes alone, so a prompt of n tokens is n - 1 tokens in steps.
    new = [n for n in range(max(2, p - spread), p) if (n - 1) % step]
    if len(new) < count:
        reached = p + settings.generation_tokens
        above = (n for n in range(reached + 1, limit + 1) if (n - 1) % step)
        new += islice(above, count - len(new))
    if len(new) < count:
        raise ValueError(f"fresh_lengths: expected at most {len(new) // len(settings.attn)} for prompts of {p} tokens")
    rng = random.Random(settings.seed)
    chosen = sorted(rng.sample(new, count))
    dealt = [chosen[i :: len(settings.attn)] for i in range(len(settings.attn))]  # alike in size
    for own in dealt:
        rng.shuffle(own)  # in rising order every first time would also pay for larger allocations
    return dealt


def _turn(loaded: Loaded, result: Result, steps: Iterator[None]) -> bool:
    """Takes one step of an implementation. False when that was the last."""
    set_attention(loaded.model, result.attn)
    with counted(result):
        try:
            next(steps)
        except StopIteration:
            return False
    return True


def _measure(
    loaded: Loaded,
    result: Result,
    lengths: list[int],
    settings: Settings,
    say: Callable[[str], None],
    advance: Callable[[], Any],
) -> Iterator[None]:
    """The measurement of one implementation, in steps between which another may take its turn."""
    try:
        release()
        say("Running warmup..")
        _trial(loaded, settings, 0)
        advance()
        yield
        p, g, b = settings.prompt_tokens, settings.generation_tokens, settings.batch_size
        say(f"Timing with prompt_tokens={p}, generation_tokens={g}, batch_size={b}.")
        for i in range(1, settings.num_trials + 1):
            time.sleep(settings.delay)
            trial = _trial(loaded, settings, i)
            result.trials.append(trial)
            advance()
            values = ", ".join(f"{key}={value:.3f}" for key, value in vars(trial).items())
            say(f"Trial {i}:  {values}")
            yield
        say("Averages: " + ", ".join(f"{key}={result.average(key):.3f}" for key in KEYS))
        for length in lengths:
            first, second = (_time_to_first(loaded, settings, length, again) for again in (0, 1))
            fresh = FreshLength(length, first, second)
            result.fresh.append(fresh)
            advance()
            advance()
            say(f"New length {length}: first={first * 1e3:.3f} ms, second={second * 1e3:.3f} ms, {fresh.ratio:.3f}x")
            yield
        if lengths:
            say(f"New lengths: median first/second={result.fresh_ratio:.3f}")
    except torch.OutOfMemoryError:
        result.error = "out of memory"
        say(f"{result.attn}: {result.error}, given up")
        release()


def _trial(loaded: Loaded, settings: Settings, number: int) -> Trial:
    p, g, b = settings.prompt_tokens, settings.generation_tokens, settings.batch_size
    device = loaded.model.device
    ids = _prompts(loaded, settings, p, number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tokens = generate_tokens(loaded.model, ids, step=settings.prefill_step_size)
    begin = clock(device)
    next(tokens)
    first = clock(device)
    _drain(islice(tokens, g - 1))
    end = clock(device)
    return Trial(
        prompt_tps=b * p / (first - begin),
        generation_tps=b * g / (end - first) if g > 1 else 0.0,
        peak_memory=peak_memory(device) / 1e9,
        total_time=end - begin,
    )


def _time_to_first(loaded: Loaded, settings: Settings, length: int, number: int) -> float:
    """Seconds from a prompt of that length to its first new token."""
    ids = _prompts(loaded, settings, length, number)
    tokens = generate_tokens(loaded.model, ids, step=settings.prefill_step_size)
    begin = clock(loaded.model.device)
    next(tokens)
    return clock(loaded.model.device) - begin


def _prompts(loaded: Loaded, settings: Settings, length: int, number: int) -> Tensor:
    """Random tokens `[B, length]`: a function of the settings, the length and the number alone."""
    generator = torch.Generator().manual_seed(random.Random(f"{settings.seed} {length} {number}").getrandbits(63))
    ids = torch.randint(loaded.config.vocab_size, (settings.batch_size, length), generator=generator)
    return ids.to(loaded.model.device)


def _drain(tokens: Iterator[Tensor]) -> None:
    deque(tokens, maxlen=0)
