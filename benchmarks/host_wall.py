"""Wall time of forward and backward, eager, of calls as models make them: ours, and each of torch's kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
import fastattn.drop_in
from fastattn.bench.timing import synchronize, text_of

from .host_cases import KERNELS, Run
from .settling import settle


@dataclass(frozen=True)
class Shape:
    """Of a call with as many queries as keys."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    padded: bool = False  #: a mask of keys


SHAPES = {
    "B=2 S=512, 32/8 heads, D=128": Shape(2, 512, 32, 8, 128, causal=True),
    "B=2 S=2048, 32/8 heads, D=128": Shape(2, 2048, 32, 8, 128, causal=True),
    "ViT: B=64 S=257, 16 heads, D=64": Shape(64, 257, 16, 16, 64),
    "BERT: B=32 S=384, 12 heads, D=64": Shape(32, 384, 12, 12, 64, padded=True),
}


def contenders(shape: Shape, device: torch.device) -> dict[str, tuple[Run, Callable[[], AbstractContextManager[Any]]]]:
    """Forward and backward of each, and what has to be in force. On a CPU of one entry and a few tokens."""
    batch, length = (shape.batch, shape.length) if device.type == "cuda" else (2, 16)
    sizes = [(batch, length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (
        torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for size in sizes
    )
    grad_out = torch.randn(sizes[0], device=device, dtype=torch.bfloat16).transpose(1, 2)
    mask = None
    if shape.padded:
        lengths = torch.linspace(length // 3, length, batch, device=device).int()
        mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None]
    options = {"attn_mask": mask, "is_causal": shape.causal, "enable_gqa": shape.heads != shape.kv_heads}

    def step(function: Callable[..., Any], **options: Any) -> Run:
        return lambda: torch.autograd.grad(function(q, k, v, **options), (q, k, v), grad_out)

    found: dict[str, tuple[Run, Callable[[], AbstractContextManager[Any]]]] = {
        "fastattn": (step(fastattn.scaled_dot_product_attention, mask="causal" if shape.causal else mask), nullcontext),
        "drop-in": (step(fastattn.drop_in.scaled_dot_product_attention, **options), nullcontext),
        "torch": (step(sdpa, **options), nullcontext),
    }
    for name, kernel in ({"torch-math": SDPBackend.MATH} | (KERNELS if device.type == "cuda" else {})).items():
        found[name] = (step(sdpa, **options), partial(sdpa_kernel, kernel))
    return found


def wall_rows(device: torch.device, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each implementation of each shape, in turns; "error" where one cannot. seconds: of a round of one."""
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        runs = contenders(shape, device)
        samples: dict[str, list[float]] = {who: [] for who in runs}
        counts: dict[str, int] = {}
        errors: dict[str, str] = {}
        for turn in range(rounds + 1):
            for who, (run, context) in runs.items():
                if who in errors:
                    continue
                try:
                    with context():
                        if turn:
                            samples[who].append(_sample(run, device, counts[who]))
                        else:
                            settle(run, device)
                            counts[who] = max(1, min(200, round(seconds * 1e6 / _sample(run, device, 2))))
                except Exception as error:
                    errors[who] = text_of(error)[:200]
        for who in runs:
            row: dict[str, Any] = {"case": name, "implementation": who}
            if who in errors:
                row["error"] = errors[who]
            else:
                median = statistics.median(samples[who])
                row |= {"us": round(min(samples[who]), 1), "median_us": round(median, 1)}
            rows.append(row)
            value = row["error"] if "error" in row else f"{row['us']:8.1f} us, median {row['median_us']:.1f}"
            print(f"{name:<35} wall time {who:<16} {value}", flush=True)
    return rows


def _sample(run: Run, device: torch.device, count: int) -> float:
    """Microseconds of one, from a GPU that has nothing to do until it has nothing to do again."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e6 / count
