"""Finds how the GEMM of one row is best launched on this GPU:

    python -m benchmarks.tune_gemms [--json FILE]

What it finds is what `lm/runners/fused/launch_config.py` holds as data. The weights are those of Llama-3.1-8B. Beside
each stands the time of cuBLAS for the GEMM alone, without the norm, gate or residual that our kernel adds to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.bench.timing import Contender, Timing, race, text_of
from fastattn.lm.runners.fused import layers
from fastattn.lm.runners.fused.launch_config import Launch, choose_launch
from fastattn.lm.runners.fused.layers import FusedGemm

from . import command

DTYPE = torch.bfloat16
SET_BYTES = 400_000_000  #: of weights that take turns: more than any L2 cache
METHOD = "GPU time of one call in a CUDA graph, weights not in the L2 cache, bfloat16; TB/s of the weight's bytes"


@dataclass(frozen=True)
class Shape:
    """A weight `[size, inner]`, twice as many rows if gated, and what is done along with its GEMM."""

    name: str
    size: int
    inner: int
    norm: bool = False
    gated: bool = False
    add: bool = False

    @property
    def nbytes(self) -> int:
        return self.size * (1 + self.gated) * self.inner * DTYPE.itemsize


SHAPES = (
    Shape("q, k, v", 6144, 4096, norm=True),
    Shape("out", 4096, 4096, add=True),
    Shape("gate and values", 14336, 4096, norm=True, gated=True),
    Shape("down", 4096, 14336, add=True),
    Shape("logits", 128256, 4096, norm=True),
)


def launches(shape: Shape) -> Iterator[Launch]:
    """All that is worth trying: 16 to 128 numbers of the weight for each thread in a step."""
    for block_n, block_k, warps in product((1, 2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8)):
        numbers = block_n * block_k * (1 + shape.gated) // (32 * warps)
        if 8 <= numbers <= 128:
            yield Launch(block_n, block_k, warps)


def tune(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Microseconds of cuBLAS, of the rule and of the best launches."""
    rule = choose_launch(shape.size, shape.inner, shape.gated, DTYPE)
    count = max(1, min(8, SET_BYTES // shape.nbytes))
    rows = shape.size * (1 + shape.gated)
    weights = [torch.randn(rows, shape.inner, device=device, dtype=DTYPE) for _ in range(count)]
    x = torch.randn(1, shape.inner, device=device, dtype=DTYPE)
    gain = torch.rand(shape.inner, device=device, dtype=DTYPE) if shape.norm else None
    out = torch.zeros(1, shape.size, device=device, dtype=DTYPE)
    contenders = [Contender("cublas", [partial(functional.linear, x, weight) for weight in weights])]
    tried = list(dict.fromkeys([rule, *launches(shape)]))
    contenders += [Contender(str(one), _calls(shape, one, weights, gain, x, out)) for one in tried]
    times: dict[str, float] = {}
    for contender in contenders:  # one graph at a time
        found = race([contender], device, rounds=3)[contender.name]
        if isinstance(found, Timing):
            times[contender.name] = found.us
        else:
            print(f"  {contender.name}: {text_of(found)}", file=sys.stderr)
    best = sorted((one for one in tried if str(one) in times), key=lambda one: times[str(one)])[:5]
    return {
        "shape": asdict(shape),
        "bytes": shape.nbytes,
        "cublas_us": times.get("cublas"),
        "rule": asdict(rule) | {"us": times.get(str(rule))},
        "best": [asdict(one) | {"us": times[str(one)]} for one in best],
    }


def _calls(
    shape: Shape, launch: Launch, weights: Sequence[Tensor], gain: Tensor | None, x: Tensor, out: Tensor
) -> list[Any]:
    calls = []
    for weight in weights:
        one = FusedGemm(weight, gain=gain, eps=1e-5, gated=shape.gated, add=shape.add)
        layers.set_launch(one, launch)
        calls.append(partial(one, x, out))
    return calls


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def time(us: float | None) -> str:
        return "-" if us is None else f"{us:.1f} us, {row['bytes'] / us / 1e6:.2f} TB/s"

    def launch(one: dict[str, Any]) -> str:
        return f"{time(one['us'])}: {one['block_n']} x {one['block_k']}, {one['warps']} warps"

    return [row["shape"]["name"], time(row["cublas_us"]), launch(row["rule"]), *map(launch, row["best"][:2])]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    head = ("", "cuBLAS", "rule", "best", "second")
    return command.tune(
        "tune_gemms", __doc__, METHOD, head, lambda device: [tune(s, device) for s in SHAPES], cells, argv
    )


if __name__ == "__main__":
    command.end(main)
