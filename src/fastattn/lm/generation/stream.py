"""Text from a loaded model: as a stream, whole, or for many prompts at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from ..checks import check_int, check_sequence
from ..loading.loaded import Loaded
from .detokenize import StopStrings, TextStream
from .engine import Engine, make_engine
from .prompts import Prompt, encode
from .results import Meter, Piece, Result
from .sampling import Sampling

Pieces = Generator[tuple[int, Piece], None, None]  #: the index of a prompt, and a piece of its text


def stream_generate(
    loaded: Loaded,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    engine: Engine | None = None,
    **sampling: Any,
) -> Generator[Piece, None, None]:
    """Continues a prompt, and yields a piece of text for each token.

    Args:
        loaded: a model with its tokenizer, from `load`.
        prompt: text, or token ids.
        max_tokens: the largest number of new tokens, >= 1. The model's length may end the text earlier.
        stop: strings that end the text and are not part of it. The end tokens of the model's generation_config
            (eos_token_id) and of its tokenizer (eos_token) end it too, and so do generation_config's stop_strings.
        engine: from `make_engine`, for repeated use: it owns the cache and the captured decode steps. Default: a new
            one, which lives as long as the iterator.
        sampling: the fields of `Sampling`; default: greedy. The sampling fields of generation_config (do_sample,
            temperature, top_k, top_p, min_p) are not used; for its other fields see `make_engine`.

    Returns:
        An iterator. Closing it frees an engine that was made for it.

    Raises:
        ValueError: an argument is not as described, the prompt has no tokens or leaves no room for any, or the model
            has no tokenizer.
    """
    checked = _sampling(sampling)
    max_tokens = check_int("max_tokens", max_tokens)
    stop = _stop_strings(loaded, stop)
    _check_engine(engine)
    ids = encode(loaded, prompt)
    engine = engine or _engine_for(loaded, [ids], max_tokens, 1)
    pieces = _stream(loaded, engine, [ids], max_tokens, stop, checked)
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
    """Continues several prompts at a time, and yields the index of a prompt and a piece of its text.

    Args:
        prompts: texts or token ids, of any lengths. They begin in this order.
        max_tokens: for all, or for each.
        batch_size: the number of prompts that run at a time, >= 1; each takes the memory of the longest. The others
            wait until one ends. Ignored with an engine, whose rows count.
        sampling: as in `stream_generate`; prompt i has the seed `seed + i`, so that equal prompts differ. A text does
            not depend on the others, except for the rounding of GEMMs, which may change with the number of rows.
        loaded, stop, engine: as in `stream_generate`.

    Raises ValueError as `stream_generate` does; the message names the prompt.
    """
    checked = _sampling(sampling)
    stop = _stop_strings(loaded, stop)
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
    return _stream(loaded, engine, all_ids, max_tokens, stop, checked)


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


def _engine_for(loaded: Loaded, prompts: list[list[int]], max_tokens: int | Sequence[int], rows: int) -> Engine:
    counts = [max_tokens] if isinstance(max_tokens, int) else max_tokens
    return make_engine(loaded, rows, max(map(len, prompts)) + max(counts))


def _sampling(options: dict[str, Any]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(known)}")
    return Sampling(**options)


def _stop_strings(loaded: Loaded, stop: Any) -> list[str]:
    """The strings that end a text: the caller's and the model's. Raises ValueError unless the caller's are strings."""
    models = getattr(getattr(loaded.model, "generation_config", None), "stop_strings", None) or []
    models = [models] if isinstance(models, str) else list(models)
    own = [stop] if isinstance(stop, str) else check_sequence("stop", stop, "strings")
    StopStrings(own)
    return [*own, *(text for text in models if isinstance(text, str) and text and text not in own)]


def _prompts(prompts: Any) -> Sequence[Prompt]:
    found: Sequence[Prompt] = check_sequence("prompts", prompts, "prompts, text or token ids each")
    return found


def _check_engine(engine: Any) -> None:
    if engine is not None and not isinstance(engine, Engine):
        raise ValueError(f"engine: expected one from make_engine, or None, got {type(engine).__name__}")


def _stream(
    loaded: Loaded,
    engine: Engine,
    prompts: list[list[int]],
    max_tokens: int | Sequence[int],
    stop: Sequence[str],
    sampling: Sampling,
) -> Pieces:
    """Checks arguments and captures decode steps before it returns; the iterator generates."""
    events = engine.generate(prompts, max_tokens, sampling)
    texts = [TextStream(loaded.tokenizer, ids, stop) for ids in prompts]

    def pieces() -> Pieces:
        with closing(events):
            for event in events:
                text, reason = texts[event.request].add(event.token, event.finish_reason)
                if reason and not event.finish_reason:  # a stop string: the engine knows tokens only
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
