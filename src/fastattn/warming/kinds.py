"""The trial calls that need every plan and kernel that calls of given kinds will need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..backends.triton.decode.chunks import MOST_QUERIES
from ..backends.triton.decode.shapes import FEW_QUERIES, MAX_ROWS, WIDE
from ..validation import FLOATING, check_flag, check_softcap, check_window, is_count

PHASES = ("prefill", "chunked", "decode", "training", "packed")
#: Memory layouts of q, k and v: "token" is `[B,S,H,D]`, as a projection writes it, "head" is `[B,H,S,D]`, "slice" is a
#: slice `[B,H,:S,D]` of a cache of more tokens.
LAYOUTS = {
    "token_major": ("token", "token", "token"),
    "cache": ("token", "slice", "slice"),
    "head_major": ("head", "slice", "slice"),
    "head_major_qk": ("head", "head", "token"),  # rotary embeddings that end in a concatenation, without a cache
}
#: The plan of a forward depends on a length only above the first number, and then on the next power of two. The plan of
#: a backward does so above the second number; for packed sequences the tokens of the batch count there.
FORWARD_CAPACITY, BACKWARD_CAPACITY = 1 << 14, 1 << 10
MANY = MOST_QUERIES + 1  #: queries: too many for the decode kernel with any number of heads
TILES = (16, 32, 64)  #: rows of the decode kernel's tiles: queries times heads per K/V head
LONG = 1024  #: keys that the decode kernel divides among several programs
CHUNK = 4 * LONG  #: keys that are worth dividing for more queries than a tile has room for


@dataclass(frozen=True)
class Attention:
    """One kind of attention: what all calls of a layer have in common, and the kinds of its calls."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    masks: tuple[str | None, ...] = ("causal",)
    windows: tuple[tuple[int, int] | None, ...] = (None,)
    sinks: bool = False
    softcap: float | None = None
    phases: tuple[str, ...] = ("prefill", "chunked", "decode")
    layouts: tuple[str, ...] = ("token_major", "cache")
    #: strides from token to token of q, k, v that are token-major slices of a wider tensor; 0: no wider tensor
    rows: tuple[int, int, int] = (0, 0, 0)
    label: str = ""  #: its name in the report

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "head_dim", "value_dim"):
            check_positive(name, getattr(self, name))
        if self.q_heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a number that divides q_heads={self.q_heads}, got {self.kv_heads}")
        if self.dtype not in FLOATING:
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {self.dtype}")
        _check_subset("masks", self.masks, (None, "causal"))
        _check_subset("phases", self.phases, PHASES)
        _check_subset("layouts", self.layouts, tuple(LAYOUTS))
        if isinstance(self.windows, str) or not self.windows:
            raise ValueError(f"windows: expected one or more of None and pairs (left, right), got {self.windows!r}")
        for window in self.windows:
            try:
                window is None or check_window(window)
            except ValueError as error:
                raise ValueError(f"windows: {error}") from error
        check_flag("sinks", self.sinks)
        if self.softcap is not None:
            check_softcap(self.softcap, self.dtype)


class Trial(NamedTuple):
    """One call: its lengths, its layout, and which lengths are on the device.

    lengths: "" none, "kv" `kv_lengths`, "both" `q_lengths` too, "intervals" one interval of keys for each sequence,
    "padded" `Segments` that leave out padding on the left, "packed" `Segments` of two sequences in each one.
    """

    q_len: int
    kv_len: int
    layout: str
    lengths: str = ""


@dataclass(frozen=True)
class Kind:
    """Calls of one phase, mask, window and batch size."""

    attention: Attention
    phase: str
    mask: str | None
    window: tuple[int, int] | None
    batch: int
    trials: tuple[Trial, ...] = field(compare=False)

    def __str__(self) -> str:
        parts = [self.attention.label, self.phase, self.mask or "no mask"]
        if self.window is not None:
            parts.append(f"window {self.window[0]},{self.window[1]}")
        return ", ".join([part for part in parts if part] + [f"batch {self.batch}"])


def kinds_of(a: Attention, batches: Sequence[int], longest: int, by_length: bool) -> list[Kind]:
    """All kinds of calls of an attention. by_length: plans depend on lengths on this device."""
    found = []
    phases = [phase for phase in PHASES if phase in a.phases]
    if "training" in phases and "packed" in phases:
        phases.append("packed training")
    for phase in phases:
        # The decode kernel splits the keys over more programs if there are fewer sequences.
        each_batch = phase in ("decode", "packed training")
        sizes = batches if each_batch else tuple({1 << (size - 1).bit_length(): size for size in batches}.values())
        for mask in dict.fromkeys(a.masks):
            for window in dict.fromkeys(a.windows):
                for size in dict.fromkeys(sizes):
                    open_ = mask is None and window is None
                    trials = tuple(dict.fromkeys(_trials(a, phase, size, open_, longest, by_length)))
                    found.append(Kind(a, phase, mask, window, size, trials))
    return found


def _trials(a: Attention, phase: str, batch: int, open_: bool, longest: int, by_length: bool) -> Iterator[Trial]:
    """The calls that need everything that calls of a phase need. open_: every query sees all keys.

    A kernel reads the lengths on the device. It is compiled for each kind of them.
    """
    group = a.q_heads // a.kv_heads
    few = _few(group, longest, max(a.head_dim, a.value_dim))
    lengths = [min(MANY, longest), *(_beyond(FORWARD_CAPACITY, longest) if by_length else ())]
    for layout in a.layouts:
        if phase == "prefill":
            kinds = ("", "padded", "intervals") if open_ else ("", "padded")
            for length in (*few, *lengths):
                for lengths_of in kinds:
                    yield Trial(length, length, layout, lengths_of)
        elif phase == "chunked":
            for q in few:
                for kv in (q + 1, min(LONG, longest)):
                    for lengths_of in ("", "kv", "both", "padded"):
                        if q < kv <= longest:
                            yield Trial(q, kv, layout, lengths_of)
            if longest > 1:
                for lengths_of in ("", "padded"):
                    yield Trial(min(MANY, longest - 1), min(2 * MANY, longest), layout, lengths_of)
            if MAX_ROWS // group + 1 < longest:
                for lengths_of in ("", "kv", "both", "padded"):
                    yield Trial(MAX_ROWS // group + 1, min(CHUNK, longest), layout, lengths_of)
            yield Trial(lengths[0], lengths[0], layout, "kv")
            for i, q in enumerate(lengths):
                yield Trial(q, q, layout, "both")
                for kv in lengths[i + 1 :]:
                    yield Trial(q, kv, layout)
        elif phase == "decode":
            for kv in (1, min(LONG, longest), *lengths[1:]):
                for lengths_of in ("", "kv", "intervals"):
                    yield Trial(1, kv, layout, lengths_of)
        elif phase == "packed":
            for length in (*few, *lengths):
                yield Trial(length, length, layout, "packed")
        elif phase == "packed training":
            tokens = [count // batch + 1 for count in _powers(BACKWARD_CAPACITY, longest * batch)] if by_length else []
            for length in sorted({min(2, longest), *tokens, *lengths}):
                yield Trial(length, length, layout, "packed")
        else:
            # In ascending order: a shorter call uses an existing plan for a longer one.
            further = _beyond(BACKWARD_CAPACITY, longest) if by_length else []
            for length in (lengths[0], *further):
                yield Trial(length, length, layout)
            yield Trial(lengths[0], lengths[0], layout, "padded")


def _few(group: int, longest: int, dim: int) -> list[int]:
    """Numbers of queries for the decode kernel: the smallest and the largest of each of its tiles."""
    found = []
    for rows in TILES:
        least, most = (rows // 2 if rows > TILES[0] else 0) // group + 1, min(rows // group, longest)
        found += sorted({least, most}) if least <= most else []
    if group > TILES[-1]:
        found.append(1)
    if (group > TILES[-1] or dim > WIDE) and FEW_QUERIES * group > TILES[-1]:  # several tiles
        found.append(min(FEW_QUERIES, longest))
    return list(dict.fromkeys(found))


def _powers(least: int, below: int) -> Iterator[int]:
    """`least`, twice that, and so on, below `below`."""
    while least < below:
        yield least
        least *= 2


def _beyond(least: int, longest: int) -> list[int]:
    """The shortest length of each power of two above `least`, up to `longest`."""
    return [power + 1 for power in _powers(least, longest)]


def check_positive(name: str, value: object) -> None:
    if not is_count(value):
        raise ValueError(f"{name}: expected an int, at least 1, got {value!r}")


def check_sequence(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name}: expected a sequence of one or more, got {values!r}")
    return tuple(values)


def _check_subset(name: str, values: tuple[Any, ...], known: tuple[Any, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: expected one or more of {', '.join(map(repr, known))}, got {value!r}")
