"""What the machine could do at most, measured: the rate of copying memory and that of a large matrix product."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import timing
from .timing import Contender, Timing, text_of

HOW = "a copy reads and writes every byte once: 2 x its bytes over its time; matrix product: 2 x n^3 over its time"


def measure(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """A row: "figures" with GB/s of copying and TFLOP/s of a bfloat16 matrix product, on a CPU of small ones.

    "error" says what failed.
    """
    count, n = (1 << 29, 8192) if device.type == "cuda" else (1 << 21, 256)
    source = torch.empty(count, dtype=torch.bfloat16, device=device).fill_(1)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    contenders = [
        Contender("copy", [partial(torch.empty_like(source).copy_, source)]),
        Contender("matmul", [partial(torch.mm, a, b, out=out)]),
    ]
    with torch.inference_mode():
        found = timing.race(contenders, device)
    copy, product = found["copy"], found["matmul"]
    row: dict[str, Any] = {"figures": {}, "how": HOW, "bytes": 2 * count, "n": n}
    if isinstance(copy, Timing):
        row["figures"]["copy GB/s"] = 2 * 2 * count / copy.us / 1e3
    if isinstance(product, Timing):
        row["figures"]["matmul TFLOP/s"] = 2.0 * n**3 / product.us / 1e6
    errors = [f"{name}: {text_of(error)}" for name, error in found.items() if not isinstance(error, Timing)]
    return row | ({"error": "; ".join(errors)} if errors else {})
