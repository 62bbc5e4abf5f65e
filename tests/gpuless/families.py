"""Every kind of call that the cuDNN backend can be asked for, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from prepared import prepared
from torch import Tensor

from fastattn import Intervals, Segments
from fastattn.call import Call

LENGTHS = ((1, 1), (1, 300), (7, 129), (64, 7), (128, 128), (300, 300))
FEW_LENGTHS = ((1, 300), (64, 7), (300, 300))
DIMS = ((64, 64), (72, 72), (128, 64), (128, 128), (192, 128), (256, 256), (264, 264), (100, 100))
MORE_DIMS = ((8, 8), (16, 16), (32, 32), (80, 80), (96, 96), (112, 112), (64, 96), (160, 160), (192, 192))
FEW_DIMS = ((64, 64), (72, 72), (128, 128))
HEADS = ((8, 8), (8, 1), (6, 2))


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def interval(q_len: int, kv_len: int) -> Intervals:
    return Intervals(numbers(0, 0)[:, None], numbers(kv_len, kv_len)[:, None])


def intervals(q_len: int, kv_len: int) -> Intervals:
    return Intervals(*(x.expand(2, q_len) for x in interval(q_len, kv_len)))


def segments(count: int, causal: bool) -> Segments:
    return Segments(torch.zeros(5, count, dtype=torch.int32), causal)


#: What a call says besides its shape: name -> (Sq, Skv, a gradient of the mask?) -> the op's arguments. Batch 2.
FAMILIES: dict[str, Callable[[int, int, bool], dict[str, Any]]] = {
    "no mask": lambda q, kv, g: {},
    "causal": lambda q, kv, g: {"mask": "causal"},
    "causal, window": lambda q, kv, g: {"mask": "causal", "window": (9, 0)},
    "window on both sides": lambda q, kv, g: {"window": (9, 3)},
    "window on the left": lambda q, kv, g: {"window": (5, -1)},
    "log-sum-exp wanted": lambda q, kv, g: {"mask": "causal", "return_lse": True},
    "sinks": lambda q, kv, g: {"mask": "causal", "sinks": torch.zeros(8)},
    "sinks, window": lambda q, kv, g: {"window": (9, 0), "sinks": torch.zeros(8)},
    "lengths on the device": lambda q, kv, g: {
        "mask": "causal", "q_lengths": numbers(q, 0), "kv_lengths": numbers(kv, 1)
    },
    "left padding (`Segments`, one a batch entry)": lambda q, kv, g: {"mask": segments(2, True)},
    "packed (`Segments`), causal": lambda q, kv, g: {"mask": segments(3, True)},
    "packed, window": lambda q, kv, g: {"mask": segments(100, False), "window": (9, 0)},
    "packed, sinks": lambda q, kv, g: {"mask": segments(17, True), "sinks": torch.zeros(8)},
    "`Intervals`, one a batch entry": lambda q, kv, g: {"mask": interval(q, kv)},
    "`Intervals`, one a batch entry, window": lambda q, kv, g: {"mask": interval(q, kv), "window": (9, 0)},
    "`Intervals`, one a query": lambda q, kv, g: {"mask": intervals(q, kv)},
    "bool mask": lambda q, kv, g: {"mask": torch.zeros(2, 1, q, kv, dtype=torch.bool)},
    "bool mask of keys, window": lambda q, kv, g: {"mask": torch.zeros(kv, dtype=torch.bool), "window": (9, 0)},
    "additive mask (a bias)": lambda q, kv, g: {"mask": torch.zeros(8, q, kv)},
    "additive mask with a gradient": lambda q, kv, g: {"mask": torch.zeros(8, q, kv, requires_grad=g)},
    "additive mask, lengths": lambda q, kv, g: {"mask": torch.zeros(q, kv), "kv_lengths": numbers(kv, 1)},
    "softcap": lambda q, kv, g: {"mask": "causal", "softcap": 20.0},
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One kind of call."""

    family: str
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    grads: bool = False
    deterministic: bool = False  #: under torch.use_deterministic_algorithms
    heads: tuple[int, int] = (8, 2)

    def call(self) -> Call:
        """One such call, of zeros. q, k and v lie in turns head-major and token-major."""
        layout, dtype = itertools.cycle((True, False)), getattr(torch, self.dtype)

        def tensor(heads: int, length: int, dim: int) -> Tensor:
            if next(layout):
                return torch.zeros(2, heads, length, dim, dtype=dtype)
            return torch.zeros(2, length, heads, dim, dtype=dtype).transpose(1, 2)

        q_heads, kv_heads = self.heads
        shapes = (
            (q_heads, self.q_len, self.head_dim),
            (kv_heads, self.kv_len, self.head_dim),
            (kv_heads, self.kv_len, self.value_dim),
        )
        q, k, v = (tensor(*shape).requires_grad_(self.grads) for shape in shapes)
        return prepared(q, k, v, **FAMILIES[self.family](self.q_len, self.kv_len, self.grads))


def questions() -> Iterator[Question]:
    for family, lengths, dims, grads in itertools.product(FAMILIES, LENGTHS, DIMS, (False, True)):
        yield Question(family, *lengths, *dims, grads=grads)
    for family, lengths, dims, grads in itertools.product(FAMILIES, FEW_LENGTHS, FEW_DIMS, (False, True)):
        yield Question(family, *lengths, *dims, dtype="float16", grads=grads)
        if grads:
            yield Question(family, *lengths, *dims, grads=True, deterministic=True)
    for lengths, grads in itertools.product(FEW_LENGTHS, (False, True)):
        for dims in MORE_DIMS:
            yield Question("causal", *lengths, *dims, grads=grads)
        for heads in HEADS:
            yield Question("causal", *lengths, 128, 128, grads=grads, heads=heads)
        for dtype in ("float32", "float64"):
            yield Question("causal", *lengths, 64, 64, dtype=dtype, grads=grads)
