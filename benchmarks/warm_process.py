"""The first call of a process, from `import torch` on: `python -m benchmarks.warm_process KIND SIZES DEVICE`.

Prints one line of JSON. Imports nothing before the clock runs but torch; the sizes are those of `never_seen_calls.py`,
which imports fastattn, and so are repeated here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

KINDS = ("causal", "decode")
_SIZES = {
    "full": (32, 8, 128, torch.bfloat16, 2049),
    "quick": (32, 8, 128, torch.bfloat16, 2049),
    "tiny": (4, 2, 16, torch.float32, 33),
}


def main(kind: str, sizes: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds by what was done, and whether triton was imported."""
    heads, kv_heads, dim, dtype, length = _SIZES[sizes]
    queries = length if kind == "causal" else 1
    start = time.perf_counter()

    def made(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, count, dim, dtype=dtype, device=device).transpose(1, 2)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    q, k, v = made(heads, queries), made(kv_heads, length), made(kv_heads, length)
    options: dict[str, Any] = {"mask": "causal"}
    if kind == "decode":
        options["kv_lengths"] = torch.full((1,), length - 1, dtype=torch.int32, device=device)
    synchronize()
    there = time.perf_counter()
    import fastattn

    attend = fastattn.scaled_dot_product_attention
    imported = time.perf_counter()
    times = [imported]
    with torch.inference_mode():
        for _ in range(2):
            attend(q, k, v, **options)
            synchronize()
            times.append(time.perf_counter())
    triton = "triton" in sys.modules
    found = fastattn.stats()
    return {
        "cuda_ms": (there - start) * 1e3,
        "import_ms": (imported - there) * 1e3,
        "call_ms": (times[1] - times[0]) * 1e3,
        "again_ms": (times[2] - times[1]) * 1e3,
        "triton_imported": triton,
        "served_by": sorted(found["calls"]),
        "disk_loads": found["binaries"]["disk_loads"],
        "compiles": found["binaries"]["compiles"],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))))
