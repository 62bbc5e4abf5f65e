"""`fastattn benchmark`: tokens per second of a whole model, for one or more attention implementations.

Flags, lines and definitions are those of mlx_lm.benchmark, so that the two can be compared:

- prompt_tps: prompt tokens of the whole batch over the time until the first new tokens exist.
- generation_tps: the new tokens of the whole batch over the time after the first of them. (All of them, as mlx_lm
  counts, although the first was paid for in the prompt's time.)
- peak_memory: in 1e9 bytes. Of torch's CUDA allocator during the trial; on a CPU the process's peak, which only grows.

Prompts are random tokens, new ones for each trial and the same for each implementation. No token ends a generation.
What runs under which name is written in `model_runners.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from ..backends.triton.binaries.store import shared as binaries
from ..lm import Loaded, set_attention
from ..lm.loading.loaded import max_length as longest_of
from ..lm.parallel import Ranks
from .loaded import (
    CommonSettings,
    Held,
    Progress,
    counted,
    describe,
    dtype_text,
    identity,
    open_model,
    peak_memory,
    progress,
    release,
    served_by,
)  # fmt: skip
from .model_report import KEYS, FreshLength, Report, Result, Trial
from .model_runners import STATIC, Runner, attention_of, make_runner, timed
from .timing import wait_for_compilers


@dataclass(frozen=True)
class Settings(CommonSettings):
    """What to measure."""

    generation_tokens: int = 1024
    prefill_step_size: int = 2048
    prompt_lengths: tuple[int, int] | None = None  #: (low, high): each prompt of a batch has a length between them
    fresh_lengths: int = 0  #: how many never-seen prompt lengths to time, per implementation
    adapter_path: str | None = None  #: see `fastattn.lm.load`

    counts = (*CommonSettings.counts, "prompt_tokens", "generation_tokens", "prefill_step_size")
    quantities = (*CommonSettings.quantities, "fresh_lengths")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_lengths is not None:
            low, high = self.prompt_lengths
            if not 1 <= low <= high:
                raise ValueError(f"prompt_lengths: expected 1 <= low <= high, got {low},{high}")
            if self.fresh_lengths:
                raise ValueError("fresh_lengths: only with prompts of one length")

    def lengths(self, number: int) -> list[int]:
        """Of the prompts of a trial."""
        if self.prompt_lengths is None:
            return [self.prompt_tokens] * self.batch_size
        rng = random.Random(f"{self.seed} lengths {number}")
        return [rng.randint(*self.prompt_lengths) for _ in range(self.batch_size)]

    @property
    def longest(self) -> int:
        """Tokens of a prompt, at the most."""
        return self.prompt_tokens if self.prompt_lengths is None else self.prompt_lengths[1]


def run(settings: Settings, ranks: Ranks | None = None) -> Report:
    """Loads the model once, then measures the implementations turn by turn: warmups, first trials, second trials, ...

    Turn by turn, because a machine's speed drifts. Prints as it goes; a progress bar appears on a terminal. An
    implementation that runs out of memory is reported and passed over. Raises ValueError before anything runs when the
    model, the device or an implementation is not usable.

    ranks: spread the model over them, each of which makes this call; what is measured is what the first one sees. Where
    one of them runs out of memory, all end.
    """
    for name in settings.attn:
        if ranks is not None and name.endswith(STATIC):
            raise ValueError(f"attn: {name} cannot be measured with --tp, its step is compiled for a whole model")
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    names = [attention_of(name) for name in settings.attn]
    loaded = open_model(settings, names, dtype, ranks=ranks, adapter_path=settings.adapter_path)
    limit = longest_of(loaded)
    longest = settings.longest + settings.generation_tokens
    if longest > limit:
        raise ValueError(f"prompt_tokens + generation_tokens: expected at most the model's {limit}, got {longest}")
    lengths = fresh_lengths(settings, limit)

    total = len(settings.attn) * (1 + settings.num_trials + 2 * settings.fresh_lengths)
    results = [Result(name) for name in settings.attn]
    held = Held(loaded.model.device)
    capacity = max(longest, *(n + 1 for own in lengths for n in own), 1)
    with progress(total, "run", len(results) > 1) as shown:
        shown.say(describe(loaded))
        turns = [
            (result, _measure(loaded, result, own, settings, capacity, held, shown))
            for result, own in zip(results, lengths)
        ]
        while turns:
            turns = [(result, steps) for result, steps in turns if _turn(loaded, result, held, steps)]
        for result in results:
            if result.calls:
                shown.say(served_by(result), result.attn)
    used: dict[str, Any] = {"dtype": dtype_text(loaded.model.dtype), "device": str(loaded.model.device)}
    used["fused_ops"] = sorted({name for result in results for name in result.fused_ops})
    if ranks is not None:
        used["world_size"] = ranks.size
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


def _turn(loaded: Loaded, result: Result, held: Held, steps: Iterator[None]) -> bool:
    """Takes one step of an implementation. False when that was the last."""
    set_attention(loaded.model, attention_of(result.attn))
    with counted(result), held.by(result.attn):
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
    capacity: int,
    held: Held,
    shown: Progress,
) -> Iterator[None]:
    """The measurement of one implementation, in steps between which another may take its turn."""
    say, advance = partial(shown.say, name=result.attn), shown.advance
    try:
        release()
        say("Running warmup..")
        runner = make_runner(loaded, result.attn, settings.batch_size, capacity, settings.prefill_step_size)
        result.fused_ops = runner.fused_ops
        if runner.fused_ops:
            say("Fused by liger-kernel: " + ", ".join(runner.fused_ops))
        yield
        result.calls.clear()  # those by which the runners were tried
        _settle(lambda: _trial(loaded, runner, settings, 0, 0))
        advance()
        yield
        p, g, b = settings.prompt_lengths or settings.prompt_tokens, settings.generation_tokens, settings.batch_size
        say(f"Timing with prompt_tokens={p}, generation_tokens={g}, batch_size={b}.")
        for i in range(1, settings.num_trials + 1):
            time.sleep(settings.delay)
            trial = _trial(loaded, runner, settings, i, held.by_others(result.attn))
            result.trials.append(trial)
            advance()
            values = ", ".join(f"{key}={value:.3f}" for key, value in vars(trial).items())
            say(f"Trial {i}:  {values}")
            yield
        say("Averages: " + ", ".join(f"{key}={result.average(key):.3f}" for key in KEYS))
        for length in lengths:
            # A length known long since goes before: both times then follow upon the same work, in caches just as warm.
            _time_to_first(loaded, runner, settings, settings.prompt_tokens, length)
            first, second = (_time_to_first(loaded, runner, settings, length, again) for again in (0, 1))
            fresh = FreshLength(length, first, second)
            result.fresh.append(fresh)
            advance()
            advance()
            say(f"New length {length}: first={first * 1e3:.3f} ms, second={second * 1e3:.3f} ms, {fresh.ratio:.3f}x")
            yield
        if lengths:
            say(f"New lengths: median first/second={result.fresh_ratio:.3f}")
    except torch.OutOfMemoryError:
        if loaded.ranks is not None:
            raise  # the others wait for this one in a collective
        result.error = "out of memory"
        say(f"{result.attn}: {result.error}, given up")
        release()


def _settle(run: Callable[[], object]) -> None:
    """Runs what is to be timed until no kernel is compiled for it any more, so that no trial changes its kernels."""
    for _ in range(3):
        before = binaries.stats()["binaries"]
        run()
        wait_for_compilers()
        if binaries.stats()["binaries"] == before:
            break


def _trial(loaded: Loaded, runner: Runner, settings: Settings, number: int, others: int) -> Trial:
    """others: bytes that other implementations hold between their turns."""
    lengths, g = settings.lengths(number), settings.generation_tokens
    device = loaded.model.device
    prompts = [_prompt(loaded, settings, length, number, row) for row, length in enumerate(lengths)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, total = timed(lambda: runner.run(prompts, g), device)
    return Trial(
        prompt_tps=sum(lengths) / first,
        generation_tps=len(lengths) * g / (total - first) if g > 1 else 0.0,
        peak_memory=(peak_memory(device) - others) / 1e9,
        total_time=total,
    )


def _time_to_first(loaded: Loaded, runner: Runner, settings: Settings, length: int, number: int) -> float:
    """Seconds from prompts of that length to their first new tokens."""
    prompts = [_prompt(loaded, settings, length, number, row) for row in range(settings.batch_size)]
    return timed(lambda: runner.run(prompts, 1), loaded.model.device)[0]


def _prompt(loaded: Loaded, settings: Settings, length: int, number: int, row: int) -> list[int]:
    """Random tokens: a function of the settings, the length and the numbers alone."""
    generator = torch.Generator().manual_seed(random.Random(f"{settings.seed} {length} {number} {row}").getrandbits(63))
    found: list[int] = torch.randint(loaded.config.vocab_size, (length,), generator=generator).tolist()
    return found
