"""Text from a loaded model: piece by piece, whole, or for many prompts at once."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..common.failures import blame
from .chat import render_chat
from .checks import check_flag, check_ids, check_int, check_sequence
from .engine import Engine, make_engine
from .load import Loaded
from .runners import longest
from .sampling import Sampling
from .text import StopStrings, TextStream

Prompt = str | Sequence[int] | Tensor  #: text, or token ids `[P]`


@dataclass(frozen=True)
class Usage:
    """What a generation took. Speeds are tokens per second, and 0 where there was nothing to time."""

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
    """What one token adds to a text."""

    text: str  #: maybe empty: a character may need several tokens, and what may begin a stop string waits
    token: int
    finish_reason: str | None = None  #: on the last piece: "stop" or "length"
    usage: Usage | None = None  #: on the last piece of `stream_generate`


@dataclass(frozen=True)
class Result:
    """A whole text."""

    text: str
    tokens: list[int]  #: the one that ended the text included
    finish_reason: str
    prompt_tokens: int


Pieces = Generator[tuple[int, Piece], None, None]  #: the number of a prompt, and what it gets


def stream_generate(
    loaded: Loaded,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    engine: Engine | None = None,
    **sampling: Any,
) -> Generator[Piece, None, None]:
    """Continues a prompt, and yields a piece of text for each token as it comes.

    Args:
        loaded: a model with its tokenizer, from `load`.
        prompt: text, or token ids.
        max_tokens: at most so many, >= 1. The model's length may end the text earlier.
        stop: strings that end the text; nothing of them is shown. The tokens that the model's generation_config
            (eos_token_id) and its tokenizer (eos_token) name end it too, and the former's stop_strings.
        engine: from `make_engine`, to be used again and again: it holds the cache and the captured decode steps.
            Default: one is made, and gone when the iterator is.
        sampling: the fields of `Sampling`; default: greedy. What generation_config says of drawing tokens (do_sample,
            temperature, top_k, top_p, min_p) is not used; of what else it says see `make_engine`.

    Returns:
        An iterator. Closing it frees what was made for it; what was shown stays right.

    Raises:
        ValueError: an argument is not as described, the prompt has no tokens or leaves no room for any, or the model
            has no tokenizer.
    """
    how = _sampling(sampling)
    max_tokens = check_int("max_tokens", max_tokens)
    stop = _stops(loaded, stop)
    _check_engine(engine)
    ids = encode(loaded, prompt)
    engine = engine or _engine_for(loaded, [ids], max_tokens, 1)
    pieces = _pieces(loaded, engine, [ids], max_tokens, stop, how)
    return _timed(loaded, pieces, len(ids))


def generate(loaded: Loaded, prompt: Prompt, **options: Any) -> str:
    """The text that continues a prompt. Arguments and errors: see `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(loaded, prompt, **options))


def stream_batch(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | Sequence[int] = 256,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    engine: Engine | None = None,
    **sampling: Any,
) -> Pieces:
    """Continues several prompts at a time, and yields the number of a prompt and a piece of its text, as they come.

    Args:
        prompts: texts or token ids, of any lengths. They begin in this order.
        max_tokens: for all, or for each.
        batch_size: how many run at a time, >= 1; each takes memory for the longest. Those that wait begin as others
            end. An engine given has its own.
        sampling: as in `stream_generate`; prompt i has the seed `seed + i`, so that equal prompts differ. A text does
            not depend on the others, but for the rounding of the model's products, which may change with their number.
        loaded, stop, engine: as in `stream_generate`.

    Raises ValueError as `stream_generate` does; the text names the prompt.
    """
    how = _sampling(sampling)
    stop = _stops(loaded, stop)
    batch_size = check_int("batch_size", batch_size)
    _check_engine(engine)
    prompts = _prompts(prompts)
    if isinstance(max_tokens, Sequence) and not isinstance(max_tokens, str):
        if len(max_tokens) != len(prompts):
            count = len(prompts)
            raise ValueError(
                f"max_tokens: expected one for all prompts or {count}, one for each, got {len(max_tokens)}"
            )
        max_tokens = [check_int("max_tokens", count) for count in max_tokens]
    else:
        max_tokens = check_int("max_tokens", max_tokens)
    all_ids = [encode(loaded, prompt, name=f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    if not all_ids:
        nothing: Sequence[tuple[int, Piece]] = ()
        return (piece for piece in nothing)
    engine = engine or _engine_for(loaded, all_ids, max_tokens, min(batch_size, len(all_ids)))
    return _pieces(loaded, engine, all_ids, max_tokens, stop, how)


def batch_generate(loaded: Loaded, prompts: Sequence[Prompt], **options: Any) -> list[Result]:
    """The texts that continue the prompts, in their order. Arguments and errors: see `stream_batch`."""
    prompts = _prompts(prompts)
    found: list[list[Piece]] = [[] for _ in prompts]
    ids = [encode(loaded, prompt, name=f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    for number, piece in stream_batch(loaded, ids, **options):
        found[number].append(piece)
    return [
        Result(
            text="".join(piece.text for piece in pieces),
            tokens=[piece.token for piece in pieces],
            finish_reason=pieces[-1].finish_reason or "",
            prompt_tokens=len(prompt),
        )
        for prompt, pieces in zip(ids, found)
    ]


def encode(loaded: Loaded, prompt: Prompt, *, chat: bool = False, name: str = "prompt") -> list[int]:
    """The tokens of a prompt.

    Args:
        prompt: text, or token ids, which are checked and returned.
        chat: put the text into the model's chat template, as a user's message.
        name: what errors call the prompt.

    Raises ValueError for a model without a tokenizer or, with `chat`, without a template or with one that fails (see
    `fastattn.lm.chat`), for a prompt that is no Unicode text, has no tokens, or is as long as the model.
    """
    if loaded.tokenizer is None:
        raise ValueError(f"loaded: {loaded.name} has no tokenizer; expected a model directory that has one")
    check_flag("chat", chat)
    if not isinstance(prompt, str):
        if chat:
            raise ValueError(f"{name}: expected text for the chat template, got {type(prompt).__name__}")
        ids = check_ids(name, prompt)
    else:
        if any("\ud800" <= c <= "\udfff" for c in prompt):  # half of a character, or bytes that were no UTF-8
            raise ValueError(f"{name}: expected Unicode text, got a lone surrogate: the text was no UTF-8")
        if chat:
            prompt = render_chat(loaded.tokenizer, [{"role": "user", "content": prompt}])
        # A template writes the special tokens itself.
        with blame(f"{name}: the model's tokenizer cannot take this text"):
            ids = loaded.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError(f"{name}: expected some text, this one has no tokens")
    if len(ids) >= longest(loaded):
        raise ValueError(f"{name}: expected fewer tokens than the model's {longest(loaded)}, got {len(ids)}")
    return ids


class Meter:
    """Counts tokens and takes their times, from when it is made."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt = prompt_tokens
        self._count = 0
        self._begin = self._first = self._last = time.perf_counter()

    def tick(self) -> None:
        """A token has come."""
        self._last = time.perf_counter()
        if not self._count:
            self._first = self._last
        self._count += 1

    def usage(self, device: torch.device) -> Usage:
        """What was counted so far."""
        prompt, rest = self._first - self._begin, self._last - self._first
        return Usage(
            prompt_tokens=self._prompt,
            prompt_tps=self._prompt / prompt if prompt else 0.0,
            generation_tokens=self._count,
            generation_tps=(self._count - 1) / rest if rest else 0.0,
            peak_memory=peak_memory(device),
        )


def _engine_for(loaded: Loaded, prompts: list[list[int]], max_tokens: int | Sequence[int], rows: int) -> Engine:
    counts = [max_tokens] if isinstance(max_tokens, int) else max_tokens
    return make_engine(loaded, rows, max(map(len, prompts)) + max(counts))


def _sampling(options: dict[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(known)}")
    return Sampling(**options)


def _stops(loaded: Loaded, stop: Any) -> list[str]:
    """The strings that end a text: the caller's and the model's. Raises ValueError unless they are strings."""
    of_model = getattr(getattr(loaded.model, "generation_config", None), "stop_strings", None) or []
    of_model = [of_model] if isinstance(of_model, str) else list(of_model)
    own = [stop] if isinstance(stop, str) else check_sequence("stop", stop, "strings")
    StopStrings(own)
    return [*own, *(text for text in of_model if isinstance(text, str) and text and text not in own)]


def _prompts(prompts: Any) -> Sequence[Prompt]:
    found: Sequence[Prompt] = check_sequence("prompts", prompts, "prompts, text or token ids each")
    return found


def _check_engine(engine: Any) -> None:
    if engine is not None and not isinstance(engine, Engine):
        raise ValueError(f"engine: expected one from make_engine, or None, got {type(engine).__name__}")


def _pieces(
    loaded: Loaded,
    engine: Engine,
    prompts: list[list[int]],
    max_tokens: int | Sequence[int],
    stop: Sequence[str],
    sampling: Sampling,
) -> Pieces:
    """Checks and prepares now; the iterator does the rest."""
    events = engine.generate(prompts, max_tokens, sampling)
    texts = [TextStream(loaded.tokenizer, ids, stop) for ids in prompts]

    def pieces() -> Pieces:
        with closing(events):
            for event in events:
                text, reason = texts[event.request].add(event.token, event.finish_reason)
                if reason and not event.finish_reason:  # a stop string, of which the engine knows nothing
                    engine.cancel(event.request)
                yield event.request, Piece(text, event.token, reason)

    return pieces()


def _timed(loaded: Loaded, pieces: Pieces, prompt_tokens: int) -> Generator[Piece, None, None]:
    meter = Meter(prompt_tokens)
    with closing(pieces):
        for _, piece in pieces:
            meter.tick()
            if piece.finish_reason:
                usage = meter.usage(loaded.model.device)
                piece = Piece(piece.text, piece.token, piece.finish_reason, usage)
            yield piece


def peak_memory(device: torch.device) -> int:
    """Bytes: of torch's CUDA allocator since its peak was last reset; on a CPU of the process, ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _counted(tokens: int) -> str:
    return f"{tokens} token" + ("s" if tokens != 1 else "")
