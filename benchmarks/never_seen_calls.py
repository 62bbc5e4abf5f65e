"""The calls of `never_seen.py`, in a process of their own: `python -m benchmarks.never_seen_calls SIZES DEVICE SEED`.

Prints one line of JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn.bench.timing import synchronize


@dataclass(frozen=True)
class Sizes:
    """Of the calls, and how many there are."""

    name: str
    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype
    longest: int
    batches: tuple[int, ...]
    count: int
    steps: int  #: calls with gradients after them
    families: tuple[dict[str, Any], ...]  #: features of each `warmup`


PLAIN: dict[str, Any] = {"masks": ("causal", None)}
FULL = Sizes(
    "full", (32, 8), 128, torch.bfloat16, 8192, (1, 2, 4, 8), 500, 200,
    (PLAIN | {"windows": (None, (1023, 0))}, {"softcap": 30.0}, {"sinks": True}),
)  # fmt: skip
QUICK = Sizes("quick", (32, 8), 128, torch.bfloat16, 4096, (1, 4), 100, 40, (PLAIN,))
TINY = Sizes("tiny", (4, 2), 16, torch.float32, 64, (1, 2), 26, 9, (PLAIN,))
BY_NAME = {sizes.name: sizes for sizes in (FULL, QUICK, TINY)}
TOKENS = 1 << 15  #: queries of a call, all entries together
#: Those that no `warmup` names, tensor masks, are here as well: their kernels are compiled in the background.
FEATURES = (
    *("causal", "full", "window", "padded", "packed", "chunk", "chunk, lengths", "decode", "decode, lengths"),
    *("decode, intervals", "softcap", "sinks", "bool mask", "bias"),
)


PHASES = ("prefill", "chunked", "decode", "packed", "training")
#: Of training steps.
TRAINED = ("causal", "full", "window", "padded", "packed", "softcap", "sinks", "bool mask", "bias")


def main(sizes: Sizes, device: torch.device, seed: int) -> dict[str, Any]:
    """What was built, by feature and together."""
    start = time.perf_counter()
    compiled = built = 0
    for family in sizes.families:
        warmth = fastattn.warmup(
            q_heads=sizes.heads[0], kv_heads=sizes.heads[1], head_dim=sizes.dim, dtype=sizes.dtype, device=device,
            batch_sizes=sizes.batches, max_length=sizes.longest, phases=PHASES, layouts=("token_major",),
            progress=False, **family,
        )  # fmt: skip
        compiled, built = compiled + warmth.compiled, built + warmth.built
    warm_ms = (time.perf_counter() - start) * 1e3
    rng, first = random.Random(seed), _counters()
    rows = measured(rng, sizes, device, features_of(sizes), sizes.count)
    trained = measured(rng, sizes, device, features_of(sizes, TRAINED), sizes.steps, trains=True)
    every = _counters() - first
    return {
        "warmup_ms": warm_ms, "warmup_compiled": compiled, "warmup_built": built,
        "count": sizes.count, "steps": sizes.steps,
        "families": [repr(family) for family in sizes.families],
        **{name: every[name] for name in ("builds", "compiles", "background_builds", "background_compiles")},
        "features": [_row(feature, found) for feature, found in rows.items() if found],
        "training": [_row(feature, found) for feature, found in trained.items() if found],
    }  # fmt: skip


def measured(
    rng: random.Random, sizes: Sizes, device: torch.device, features: Sequence[str], count: int, trains: bool = False
) -> dict[str, list[tuple[float, Counter[str]]]]:
    """Of each feature the milliseconds of its calls, no shape twice, and what each of them counted. trains: forward and
    backward."""
    seen: set[tuple[str, int, int, int]] = set()
    rows: dict[str, list[tuple[float, Counter[str]]]] = {feature: [] for feature in features}
    while len(seen) < count:
        shape = drawn(rng, sizes, features[len(seen) % len(features)])
        if shape in seen:
            continue
        seen.add(shape)
        with nullcontext() if trains else torch.inference_mode():
            tensors, options = arguments(shape, sizes, device)
            leaves = [x.requires_grad_() for x in tensors] if trains else []
            grad_out = torch.randn_like(tensors[0])
            synchronize(device)
            before, begin = _counters(), time.perf_counter()
            out = fastattn.scaled_dot_product_attention(*tensors, **options)
            if trains:
                torch.autograd.grad(out, leaves, grad_out)
            synchronize(device)
        rows[shape[0]].append(((time.perf_counter() - begin) * 1e3, _counters() - before))
    return rows


def _row(feature: str, found: list[tuple[float, Counter[str]]]) -> dict[str, Any]:
    times, counted = [ms for ms, _ in found], sum([counter for _, counter in found], Counter[str]())
    served = sorted(name.removeprefix("by ") for name in counted if name.startswith("by "))
    return {
        "feature": feature, "count": len(found), "builds": counted["builds"], "compiles": counted["compiles"],
        "median_ms": round(statistics.median(times), 3), "worst_ms": round(max(times), 3), "served_by": served,
    }  # fmt: skip


def features_of(sizes: Sizes, of: Sequence[str] = FEATURES) -> tuple[str, ...]:
    """Those that were warmed up, and those that cannot be."""
    named = {"window": "windows", "softcap": "softcap", "sinks": "sinks"}
    options = set().union(*sizes.families)
    return tuple(name for name in of if name not in named or named[name] in options)


def drawn(rng: random.Random, sizes: Sizes, feature: str) -> tuple[str, int, int, int]:
    """The feature; batch, queries and keys."""
    batch = rng.choice(sizes.batches)
    kv = rng.randint(2, min(sizes.longest, TOKENS // batch))
    if feature.startswith("decode"):
        return feature, batch, 1, kv
    if feature.startswith("chunk"):
        return feature, batch, rng.randint(1, kv), kv
    return feature, batch, kv, kv


def arguments(
    shape: tuple[str, int, int, int], sizes: Sizes, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """q, k and v, and the op's options."""
    feature, batch, q_len, kv_len = shape
    heads = sizes.heads

    def made(length: int, count: int) -> Tensor:
        return torch.randn(batch, length, count, sizes.dim, dtype=sizes.dtype, device=device).transpose(1, 2)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tensors = made(q_len, heads[0]), made(kv_len, heads[1]), made(kv_len, heads[1])
    options: dict[str, Any] = {"mask": "causal"}
    lengths = ints(*[max(1, kv_len - 3 * entry) for entry in range(batch)])
    if feature == "full":
        options = {}
    elif feature == "window":
        options["window"] = (1023, 0)
    elif feature == "padded":
        options = {"mask": Segments.left_padded(kv_len - lengths, q_len, kv_len, causal=True)}
    elif feature == "packed":
        half = q_len // 2
        table = [(entry, a, b) for entry in range(batch) for a, b in ((0, half), (half, q_len))]
        options = {"mask": Segments(torch.tensor(table, dtype=torch.int32, device=device).T.contiguous(), True)}
    elif feature in ("chunk, lengths", "decode, lengths"):
        options["kv_lengths"] = lengths
    elif feature == "decode, intervals":
        options = {"mask": Intervals(ints(*[0] * batch)[:, None], lengths[:, None])}
    elif feature == "softcap":
        options["softcap"] = 30.0
    elif feature == "sinks":
        options["sinks"] = torch.randn(heads[0], dtype=sizes.dtype, device=device)
    elif feature == "bool mask":
        options = {"mask": torch.arange(kv_len, device=device) < lengths[:, None, None, None]}
    elif feature == "bias":
        options = {"mask": torch.randn(1, 1, q_len, kv_len, dtype=sizes.dtype, device=device)}
    return tensors, options


def _counters() -> Counter[str]:
    found = fastattn.stats()
    counted: Counter[str] = Counter()
    for kind in ("builds", "background_builds"):
        counted[kind] = int(found["plans"][kind])
    for kind in ("compiles", "background_compiles"):
        counted[kind] = int(found["binaries"][kind])
    counted.update({f"by {name}": count for name, count in found["calls"].items()})
    return counted


if __name__ == "__main__":
    print(json.dumps(main(BY_NAME[sys.argv[1]], torch.device(sys.argv[2]), int(sys.argv[3]))))
