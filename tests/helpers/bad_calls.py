"""The public API as data: calls that are good, and for each argument what it must not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from op_arguments import BAD as BAD_FOR_THE_OP
from op_arguments import FINE, good
from torch import Tensor

import fastattn
from fastattn import KVCache, Segments


class Foreign:
    """Of no use as any argument."""

    def __repr__(self) -> str:
        return "a foreign object"


#: Values of every type but a tensor's: (the kinds of arguments for which it would do, value).
JUNK: list[tuple[str, Any]] = [
    ("optional", None), ("flag", True), ("flag", False), ("number", math.nan), ("number", math.inf), ("number", 0.5),
    ("number int", 0), ("number int", -1), ("number int", 3), ("", 1j), ("", ""),
    ("text", "causal"), ("text", "torch"), ("", "no such thing"), ("", b"torch"), ("sequence", []), ("sequence", ()),
    ("sequence", [1, 2]), ("sequence pair", (1, 2)), ("", {}), ("", {1, 2}), ("", object()), ("", int),
    ("", lambda: None), ("", Foreign()), ("", [[1.0]]), ("", Fraction(1, 2)), ("", range(2)),
]  # fmt: skip


def junk(*kinds: str) -> list[Any]:
    """What is none of these kinds."""
    return [value for would_do, value in JUNK if not set(would_do.split()) & set(kinds)]


HUGE = [2**70, 10**400]  #: ints that no tensor's size can be
NO_TENSOR = junk("optional")
NO_SIZE = [value for value in junk() if not (type(value) is int and value > 0)]
NO_FLAG = junk("flag")
_NO_LENGTH = [value for value in NO_SIZE if not (type(value) is int and value == 0)]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Entry:
    """A public function. good: arguments that it takes; bad: argument -> values of which it may take none."""

    name: str
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    bad: dict[str, list[Any]]


def packs() -> dict[str, Any]:
    q, k, v = torch.randn(7, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_kv": ints(0, 5, 9)}


_CU = [*NO_TENSOR, None, ints(0, 3, 7).long(), torch.zeros(3), ints(), ints(0, 7), ints(0, 3, 5, 7)]
_CU += [ints(0, 3, 7)[None], torch.tensor(0, dtype=torch.int32), ints(0, 3, 7).to("meta")]
_OF_THE_OP = {name: [*values] for name, values in BAD_FOR_THE_OP.items()}
for _name in ("q", "k", "v", "sinks", "q_lengths", "kv_lengths"):
    _OF_THE_OP[_name] += NO_TENSOR
_OF_THE_OP["return_lse"] += NO_FLAG
_OF_THE_OP["v"] += [good()["v"][:, :, :-1], good()["v"][:, :1], good()["v"][:1]]
_OF_THE_OP["k"] += [good()["k"][..., :-1], good()["k"][:1]]
_SHARED = {name: _OF_THE_OP[name] for name in ("scale", "softcap", "window", "backend")}


def cache_sizes() -> dict[str, Any]:
    return {"layers": 2, "batch": 2, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}


def cache(tokens: int = 1) -> KVCache:
    found = KVCache(**cache_sizes(), capacity=16)
    found.step(tokens)
    return found


def tokens() -> dict[str, Any]:
    return {"layer": 1, "q": torch.randn(2, 4, 1, 8), "k": torch.randn(2, 2, 1, 8), "v": torch.randn(2, 2, 1, 8)}


_NO_KV = [*NO_TENSOR, None, torch.randn(2, 2, 8), torch.randn(2, 2, 2, 8), torch.randn(1, 2, 1, 8)]
_NO_KV += [torch.randn(2, 2, 1, 9), torch.randn(2, 2, 1, 8).to("meta"), torch.randn(2, 2, 1, 8).to_sparse()]
_NO_ROWS = [ints(0)[None], ints(0).short(), ints(0).to("meta"), ints(-1), ints(2), ints(0, -3), ints(1, 2).long()]
_NO_ROWS += [torch.tensor([2**40]), torch.tensor([-(2**40)]), ints(0, 1).to_sparse(), torch.tensor(0)]
_NO_DTYPE = [*junk(), torch.int32, torch.bool, torch.complex64]
_NO_DEVICE = [*junk("optional", "int", "number"), "no:such:device", -2]


def within(names: Any) -> None:
    with fastattn.use_backend(*names):
        pass


def warmth() -> dict[str, Any]:
    return {
        "q_heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": torch.float32, "device": "cpu", "max_length": 4,
        "progress": False,
    }  # fmt: skip


_NO_LIST = junk("sequence", "pair")
_NONE_OF_THEM: list[Any] = [(), [], ("no such thing",), [object()], (1.5,), [[]], ({},)]

ENTRIES = (
    Entry("attention", fastattn.scaled_dot_product_attention, good, _OF_THE_OP),
    Entry("explain", fastattn.explain, good, _OF_THE_OP),
    Entry(
        "varlen",
        fastattn.varlen_attention,
        packs,
        {
            "q": [*NO_TENSOR, None, torch.randn(7, 8), torch.randn(1, 4, 7, 8), torch.ones(7, 4, 8).int()],
            "k": [*NO_TENSOR, None, torch.randn(9, 3, 8), torch.randn(9, 2, 9), torch.randn(9, 2, 8).to("meta")],
            "v": [*NO_TENSOR, None, torch.randn(8, 2, 8), torch.randn(9, 1, 8), torch.randn(9, 2)],
            "cu_seqlens_q": _CU,
            "cu_seqlens_kv": _CU,
            "causal": NO_FLAG,
            "sinks": [*NO_TENSOR, torch.zeros(3), torch.zeros(4).int()],
            "return_lse": NO_FLAG,
            **_SHARED,
        },
    ),
    Entry(
        "KVCache",
        KVCache,
        cache_sizes,
        {
            **{name: NO_SIZE for name in ("layers", "batch", "kv_heads", "head_dim")},
            **{name: [x for x in NO_SIZE if x is not None] for name in ("value_dim", "capacity")},
            "windows": [*junk("optional", "int", "sequence", "pair"), 0, -1, True, 2.5, [3], [3, 0], (1, 2, 3), "ab"],
            "dtype": _NO_DTYPE,
            "device": [*_NO_DEVICE, "cuda:99", torch.device("cuda", 99)],
        },
    ),
    Entry(
        "KVCache.step",
        lambda **arguments: cache().step(**arguments),
        lambda: {"tokens": 1},
        {
            "tokens": [*NO_SIZE, 17, 10**6],
            "counts": [*NO_TENSOR, ints(1, 1).long(), torch.ones(2), ints(1), ints(1, 1, 1), ints(1, 1).to("meta")],
        },
    ),
    Entry(
        "KVCache.attend",
        lambda **arguments: cache().attend(**arguments),
        tokens,
        {
            "layer": [*[x for x in NO_SIZE if not (type(x) is int and x == 0)], 2, -1],
            "q": [*_NO_KV, torch.randn(2, 3, 1, 8)],
            "k": _NO_KV,
            "v": _NO_KV,
            "sinks": _OF_THE_OP["sinks"],
            **{name: _OF_THE_OP[name] for name in ("scale", "softcap", "backend")},
        },
    ),
    Entry(
        "KVCache.reset",
        lambda **arguments: cache().reset(**arguments),
        lambda: {"rows": ints(0)},
        {"rows": [*NO_TENSOR, torch.ones(2), torch.ones(3).bool(), torch.ones(2).bool().to("meta"), *_NO_ROWS]},
    ),
    Entry(
        "KVCache.reorder",
        lambda **arguments: cache().reorder(**arguments),
        lambda: {"rows": ints(1, 0)},
        {"rows": [*NO_TENSOR, None, torch.ones(2), torch.ones(2).bool(), *_NO_ROWS]},
    ),
    Entry(
        "KVCache.add_rows",
        lambda **arguments: cache().add_rows(**arguments),
        lambda: {"count": 1},
        {"count": NO_SIZE},
    ),
    Entry(
        "warmup",
        fastattn.warmup,
        warmth,
        {
            **{name: NO_SIZE for name in ("q_heads", "kv_heads", "head_dim", "max_length")},
            "value_dim": [x for x in NO_SIZE if x is not None],
            "dtype": _NO_DTYPE,
            "device": _NO_DEVICE,
            "batch_sizes": [*_NO_LIST, *_NONE_OF_THEM, (0,), (True,), (1, -1)],
            "masks": [*_NO_LIST, *_NONE_OF_THEM, "causal"],
            "windows": [*_NO_LIST, *_NONE_OF_THEM, (3, 4), ((1,),), ((-2, 0),), "ab"],
            "phases": [*_NO_LIST, *_NONE_OF_THEM, "decode"],
            "layouts": [*_NO_LIST, *_NONE_OF_THEM, "cache"],
            "sinks": NO_FLAG,
            "softcap": [x for x in BAD_FOR_THE_OP["softcap"]],
            "progress": NO_FLAG,
        },
    ),
    Entry(
        "use_backend",
        within,
        lambda: {"names": ("torch",)},
        {"names": [(), *((x,) for x in junk() if x != "torch"), ("torch", "Torch"), ("torch", 3), (["torch"],)]},
    ),
    Entry(
        "Segments.packed",
        lambda **arguments: fastattn.scaled_dot_product_attention(
            *(torch.randn(1, 2, 7, 8) for _ in range(3)), mask=Segments.packed(**arguments)
        ),
        lambda: {"cu_seqlens": ints(0, 3, 7)},
        {
            "cu_seqlens": [*NO_TENSOR, None, ints(0, 3, 7).long(), torch.zeros(3), ints(0, 3, 7)[None], ints()],
            "cu_seqlens_kv": [
                *NO_TENSOR, ints(0, 7), ints(0, 3, 7)[None], ints(0, 3, 7).long(), ints(0, 3, 7).to("meta"),
            ],
            "causal": NO_FLAG,
        },
    ),
    Entry(
        "Segments.left_padded",
        lambda **arguments: fastattn.scaled_dot_product_attention(
            *(torch.randn(2, 2, 7, 8) for _ in range(3)), mask=Segments.left_padded(**arguments)
        ),
        lambda: {"padding": ints(0, 3), "q_len": 7, "kv_len": 7},
        {
            "padding": [
                *NO_TENSOR, None, torch.zeros(2), ints(0, 3).long(), ints(0, 3)[None], ints(0, 3).bool(),
                ints(0, 3).to_sparse(), torch.tensor(3, dtype=torch.int32), ints(0, 3).to("meta"),
            ],
            "q_len": [*_NO_LENGTH, *HUGE],
            "kv_len": [*_NO_LENGTH, *HUGE],
            "causal": NO_FLAG,
        },
    ),
    Entry(
        "Segments",
        lambda **arguments: fastattn.scaled_dot_product_attention(
            *(torch.randn(2, 2, 7, 8) for _ in range(3)), mask=Segments(**arguments)
        ),
        lambda: {"table": ints(0, 1, 0, 0, 7, 7).view(3, 2)},
        {
            "table": [
                *NO_TENSOR, None, ints(0, 0, 7), ints(0, 7)[None], ints(0, 0, 0, 7, 0, 7)[:, None],
                ints(0, 0, 7)[:, None].long(),
                torch.zeros(3, 2), ints(0, 0, 7)[:, None].to("meta"), ints(0, 0, 7)[:, None].to_sparse(),
            ],
            "causal": NO_FLAG,
        },
    ),
    Entry(
        "Intervals",
        lambda **arguments: fastattn.scaled_dot_product_attention(
            *(torch.randn(2, 2, 7, 8) for _ in range(3)), mask=fastattn.Intervals(**arguments)
        ),
        lambda: {"lo": ints(0, 3)[:, None], "hi": ints(7, 7)[:, None]},
        {
            name: [
                *NO_TENSOR, None, ints(0, 3), ints(0, 3)[:, None].long(), torch.zeros(2, 1), ints(0, 1, 2)[:, None],
                ints(0, 3)[None], ints(0, 3)[:, None].to("meta"), ints(0, 3)[:, None].to_sparse(),
            ]
            for name in ("lo", "hi")
        },
    ),
    Entry(
        "Segments.left_padded, fewer queries",
        lambda **arguments: fastattn.scaled_dot_product_attention(
            torch.randn(2, 2, 3, 8),
            *(torch.randn(2, 2, 7, 8) for _ in range(2)),
            mask=Segments.left_padded(**arguments),
        ),
        lambda: {"padding": ints(0, 3), "q_len": 3, "kv_len": 7},
        {"q_len": _NO_LENGTH, "kv_len": _NO_LENGTH, "causal": NO_FLAG},
    ),
)  # fmt: skip

#: Other names under which a message may speak of an argument: what it becomes, or what holds it.
ALSO = {
    "names": ("use_backend",),
    "cu_seqlens": ("mask.table",),
    "padding": ("mask.table",),
    "causal": ("mask.causal",),
    "table": ("mask.table",),
    "lo": ("mask.lo", "mask.hi"),
    "hi": ("mask.hi", "mask.lo"),
}
#: (entry, argument) -> what it may be as well.
ALSO_FINE = {("attention", name): values for name, values in FINE.items()}
