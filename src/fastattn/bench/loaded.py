"""A loaded model under measurement, in generation or in training: clock, memory, backends, and what names it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from .. import stats
from ..lm import Loaded, load, set_attention
from ..lm.generation.results import peak_memory as peak_memory
from ..lm.loading.attention import check_attention
from .model_report import Outcome
from .results import guarded
from .timing import synchronize

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class CommonSettings:
    """What every benchmark of a model is told. Raises ValueError, naming the field, for a value that makes no sense."""

    model: str
    prompt_tokens: int = 512
    batch_size: int = 1
    num_trials: int = 5
    delay: float = 0.0  #: seconds to rest before each trial
    attn: tuple[str, ...] = ("fastattn",)
    dtype: str | None = None  #: one of `DTYPES`; None as in `fastattn.lm.load`
    device: str | None = None
    seed: int = 0
    fused_ops: bool | None = None  #: see `fastattn.lm.load`; fastattn alone uses them
    trust_remote_code: bool = False  #: see `fastattn.lm.load`

    counts: ClassVar[tuple[str, ...]] = ("batch_size", "num_trials")  #: fields that are at least 1
    quantities: ClassVar[tuple[str, ...]] = ("delay", "seed")  #: fields that are at least 0

    def __post_init__(self) -> None:
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in self.quantities:
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.attn or len(set(self.attn)) < len(self.attn):
            raise ValueError(f"attn: expected one or more names, each once, got {','.join(self.attn) or 'none'}")
        if self.fused_ops and "fastattn" not in self.attn:
            raise ValueError("fused_ops: only fastattn uses them, which is not among the implementations")


def default_model() -> str:
    """The preset to measure when none is named: the real thing where there is a GPU for it."""
    return "llama-3.1-8b" if torch.cuda.is_available() else "tiny"


def open_model(settings: CommonSettings, attentions: Sequence[str], dtype: torch.dtype | None, **more: Any) -> Loaded:
    """Loads the settings' model once, for several attention implementations. more: as for `fastattn.lm.load`.

    Raises ValueError before anything runs when the model, the device or an implementation is not usable.
    """
    for name in attentions:
        check_attention(name)
    from transformers import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # transformers draws one while loading, into log files too
    more |= {"fused_ops": settings.fused_ops, "trust_remote_code": settings.trust_remote_code}
    loaded = load(settings.model, attentions[0], dtype, settings.device, settings.seed, **more)
    for name in attentions[1:]:
        set_attention(loaded.model, name)
    return loaded


class Progress:
    """Lines on stdout, each with the name of its implementation if there are several, and a bar on a terminal."""

    def __init__(self, bar: Any, several: bool) -> None:
        self.advance: Callable[[], Any] = bar.update
        self._bar, self._several = bar, several

    def say(self, line: str, name: str | None = None) -> None:
        self._bar.write(f"[{name}] {line}" if name and self._several else line)
        sys.stdout.flush()  # a pipe gets each line when it is true, not at the end


@contextmanager
def progress(total: int, unit: str, several: bool) -> Iterator[Progress]:
    """The progress of so many units of work."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, leave=False, disable=None) as bar:
        yield Progress(bar, several)


def served_by(result: Outcome) -> str:
    """The calls that fastattn served, by backend, in one line."""
    return "Served by: " + ", ".join(f"{key} {n}" for key, n in result.calls.items())


def clock(device: torch.device) -> float:
    """The time when all that was queued on the device is done."""
    synchronize(device)
    return time.perf_counter()


def release() -> None:
    """Gives back what the last implementation left in the allocator, so that it does not count against the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Held:
    """Bytes that implementations keep between their turns: a peak while one has its turn is not due to the others'."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes: dict[str, int] = {}

    @contextmanager
    def by(self, name: str) -> Iterator[None]:
        """What is allocated within the block and still there at its end is held by that one."""
        before = self._allocated()
        try:
            yield
        finally:
            self._bytes[name] = self._bytes.get(name, 0) + self._allocated() - before

    def by_others(self, name: str) -> int:
        return sum(count for other, count in self._bytes.items() if other != name)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0


@contextmanager
def counted(result: Outcome) -> Iterator[None]:
    """Adds the calls that fastattn serves within the block to the result, by backend."""
    before = stats()["calls"]
    try:
        yield
    finally:
        after = stats()
        for key, n in after["calls"].items():
            if n > before.get(key, 0):
                result.calls[key] = result.calls.get(key, 0) + n - before.get(key, 0)
                result.plans = after["plans"]


def identity(loaded: Loaded) -> dict[str, Any]:
    """The model as a result file names it; None for a size that its config does not have, or not for all layers."""
    config, parameters = loaded.config, sum(parameter.numel() for parameter in loaded.model.parameters())
    random_weights = loaded.tokenizer is None
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    found = {"name": loaded.name, "type": config.model_type, "parameters": parameters, "random_weights": random_weights}
    # transformers raises, and no AttributeError, for what differs between layers: Gemma 4's head_dim.
    return found | {key: guarded(partial(getattr, config, key, None)) for key in shape}


def describe(loaded: Loaded) -> str:
    """The model in one line."""
    model, count = loaded.model, sum(parameter.numel() for parameter in loaded.model.parameters())
    size = f"{count / 1e9:.2f}e9" if count >= 1e8 else f"{count / 1e6:.2f}e6"
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU"
    weights = "random weights" if loaded.tokenizer is None else "its own weights"
    ranks = f", spread over {loaded.ranks.size} ranks" if loaded.ranks else ""
    return f"Model {loaded.name}: {size} parameters ({weights}), {dtype_text(model.dtype)}, on {where}{ranks}"


def dtype_text(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
