"""Finds where decode ends and cuDNN begins on this GPU: `python -m benchmarks.tune_routing [--json FILE]`.

Both backends take the same calls of few queries: by queries, rows of the tile, keys and batch. What it finds is what
`backends/triton/decode/launch_config.py` holds as data: the rows of a tile, and which of them cuDNN serves faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from fastattn.api import scaled_dot_product_attention
from fastattn.bench.case import Case
from fastattn.bench.inputs import Inputs, make_inputs, set_count
from fastattn.bench.timing import Contender, Timing, race, text_of

from . import command

BACKENDS = ("decode", "cudnn")
METHOD = "GPU time of one call in a CUDA graph, K and V [B,Hkv,S,D] and not in the L2 cache, bfloat16, causal; " + (
    "cudnn: with its dynamic plan, as a call that was not seen before gets it"
)


def cases() -> list[Case]:
    """What is measured: up to the rows that a tile has, 4 or 8 heads to a K/V head."""
    found = [
        Case(q_len, kv_len, batch, 32, 8, 128, head_major=True)
        for batch, q_len, kv_len in product((1, 8, 32), (1, 4, 8, 16), (256, 2048, 16384))
        if batch * kv_len <= 1 << 17
    ]
    return [*found, *(Case(8, n, 1, 64, 8, 64, head_major=True) for n in (256, 2048, 16384))]


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Microseconds by backend, or why there are none."""
    generator = torch.Generator(device).manual_seed(0)
    count = set_count(case, torch.cuda.get_device_properties(device).L2_cache_size)
    inputs = make_inputs(case, device, generator, count)
    found: dict[str, Any] = {"case": case.label(), "rows": case.q_len * case.q_heads // case.kv_heads}
    contenders = [Contender(name, [partial(_call, x, name) for x in inputs]) for name in BACKENDS]
    for name, timing in race(contenders, device, rounds=5).items():
        found[name] = timing.us if isinstance(timing, Timing) else text_of(timing)
    return found


def _call(x: Inputs, backend: str) -> Any:
    return scaled_dot_product_attention(x.q, x.k, x.v, mask="causal", backend=backend)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    times = [row[name] for name in BACKENDS]
    found = [f"{us:.1f}" if isinstance(us, float) else str(us)[:60] for us in times]
    good = all(isinstance(us, float) for us in times)
    return [row["case"], str(row["rows"]), *found, f"{times[0] / times[1]:.2f}x" if good else "-"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    head = ("", "rows", "decode, us", "cudnn, us", "decode / cudnn")
    return command.tune(
        "tune_routing", __doc__, METHOD, head, lambda device: [measure(c, device) for c in cases()], cells, argv
    )


if __name__ == "__main__":
    command.end(main)
