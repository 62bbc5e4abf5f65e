"""The runners of the model benchmark, which continue prompts: fastattn's engine, and transformers' own.

- `fastattn`: the engine of `fastattn.lm`.
- a name that transformers knows (`sdpa`, `eager`, ...): its model in a plain loop, with a cache that grows. Prompts of
  different lengths go through its `generate`, padded on the left.
- such a name and `-static`: its `generate` with a static cache, which compiles the decode step: the fastest it has.
- `fastattn-hf`: as the second, with fastattn for attention.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch

from ..lm import Loaded, generate_tokens
from .loaded import clock

Prompts = Sequence[Sequence[int]]
STATIC, LOOP = "-static", "-hf"


class Runner(Protocol):
    """Continues prompts with one implementation."""

    fused_ops: tuple[str, ...]  #: of the model's operations those that liger-kernel replaces

    def run(self, prompts: Prompts, tokens: int) -> tuple[float, float]:
        """Continues each prompt by so many tokens. Returns two times of the clock: when every prompt had its first new
        token, and when all was done."""
        ...


def attention_of(name: str) -> str:
    """The attention implementation that a runner uses."""
    return name.removesuffix(STATIC).removesuffix(LOOP)


def make_runner(loaded: Loaded, name: str, rows: int, capacity: int, step: int) -> Runner:
    """A runner by name, for up to `rows` prompts at a time of at most `capacity` tokens each, generated ones included.

    step: prompt tokens at a time, where it can be chosen.
    """
    if name == "fastattn":
        return _Engine(loaded, rows, capacity, step)
    if name.endswith(STATIC):
        return _Generate(loaded, "static", capacity)
    return _Loop(loaded, step)


class _Engine:
    def __init__(self, loaded: Loaded, rows: int, capacity: int, step: int) -> None:
        from ..lm.generation.engine import Engine
        from ..lm.runners.select import make_runner

        runner = make_runner(loaded, rows, capacity, prefill_step=step)
        self.fused_ops: tuple[str, ...] = getattr(runner, "fused_ops", ())
        self._engine = Engine(runner, eos_ids=(), ranks=loaded.ranks)

    def run(self, prompts: Prompts, tokens: int) -> tuple[float, float]:
        begun: set[int] = set()
        first = 0.0
        for event in self._engine.generate(prompts, tokens):  # an event comes when its token has reached the host
            if len(begun) < len(prompts):
                begun.add(event.request)
                if len(begun) == len(prompts):
                    first = time.perf_counter()
        return first, time.perf_counter()


class _Loop:
    fused_ops: tuple[str, ...] = ()

    def __init__(self, loaded: Loaded, step: int) -> None:
        self._loaded = loaded
        self._step = step

    def run(self, prompts: Prompts, tokens: int) -> tuple[float, float]:
        device = self._loaded.model.device
        if len({len(prompt) for prompt in prompts}) > 1:
            return _Generate(self._loaded, None, 0).run(prompts, tokens)
        made = generate_tokens(self._loaded.model, torch.tensor(prompts, device=device), step=self._step)
        next(made)
        first = clock(device)
        deque(islice(made, tokens - 1), maxlen=0)
        return first, clock(device)


class _Generate:
    """transformers' `generate`, greedily. cache: its `cache_implementation`; with a static one every call has room for
    `capacity` tokens, as each other size would be compiled anew."""

    fused_ops: tuple[str, ...] = ()

    def __init__(self, loaded: Loaded, cache: str | None, capacity: int) -> None:
        self._loaded = loaded
        self._options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
        self._capacity = capacity

    def run(self, prompts: Prompts, tokens: int) -> tuple[float, float]:
        from transformers import StoppingCriteriaList

        model = self._loaded.model
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []

        def look(ids: Any, scores: Any, **rest: Any) -> torch.Tensor:
            """Called after each token; never stops."""
            if not times:
                times.append(clock(model.device))
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=real.to(model.device),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([look]),
                **self._options,
            )
        return times[0], clock(model.device)


def timed(run: Callable[[], tuple[float, float]], device: torch.device) -> tuple[float, float]:
    """Seconds to the first new tokens, and to the end."""
    begin = clock(device)
    first, end = run()
    return first - begin, end - begin
