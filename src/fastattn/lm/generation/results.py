"""What a generation returns: pieces of text, whole texts, and how much time and memory they took."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Usage:
    """Tokens, speeds and memory of a generation. Speeds are tokens per second, and 0 if there was nothing to time."""

    prompt_tokens: int
    prompt_tps: float  #: until the first new token
    generation_tokens: int
    generation_tps: float  #: of the tokens after the first
    peak_memory: int  #: bytes, see `peak_memory`

    def __str__(self) -> str:
        prompt = f"prompt: {_counted(self.prompt_tokens)}, {self.prompt_tps:.1f} tokens/s"
        generation = f"generation: {_counted(self.generation_tokens)}"
        if self.generation_tps:
            generation += f", {self.generation_tps:.1f} tokens/s"
        return f"{prompt}; {generation}; peak memory: {self.peak_memory / 1e9:.3f} GB"


@dataclass(frozen=True)
class Piece:
    """The text that one token adds."""

    text: str  #: may be empty: a character may need several tokens, and the beginning of a stop string is held back
    token: int
    finish_reason: str | None = None  #: on the last piece: "stop" or "length"
    usage: Usage | None = None  #: on the last piece of `stream_generate`


@dataclass(frozen=True)
class Result:
    """A whole text."""

    text: str
    tokens: list[int]  #: including the one that ended the text
    finish_reason: str
    prompt_tokens: int


class Meter:
    """Counts tokens and measures their times, beginning when it is made."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._count = 0
        self._begin = self._first = self._last = time.perf_counter()

    def tick(self) -> None:
        """Counts a token."""
        self._last = time.perf_counter()
        if not self._count:
            self._first = self._last
        self._count += 1

    def usage(self, device: torch.device) -> Usage:
        """The usage so far."""
        prompt, rest = self._first - self._begin, self._last - self._first
        return Usage(
            prompt_tokens=self._prompt,
            prompt_tps=self._prompt / prompt if prompt else 0.0,
            generation_tokens=self._count,
            generation_tps=(self._count - 1) / rest if rest else 0.0,
            peak_memory=peak_memory(device),
        )


def peak_memory(device: torch.device) -> int:
    """Bytes: of torch's CUDA allocator since its peak was last reset; on a CPU of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _counted(tokens: int) -> str:
    return f"{tokens} token" + ("s" if tokens != 1 else "")
