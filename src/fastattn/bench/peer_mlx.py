"""MLX's `mx.fast.scaled_dot_product_attention`, in a process of its own: a framework beside torch in one might clash.

Here: tensors go out as a file, and the result and its times come back. There (`python -m fastattn.bench.peer_mlx
FOLDER SETS`): MLX alone, no torch.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHILD_SECONDS = 60
MOST_BYTES = 256 << 20  #: of the tensors that are handed over
ROUNDS = 7
ROUND_SECONDS = 0.02


def measure(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, sinks: Tensor | None, scale: float, sets: int
) -> tuple[Tensor, dict[str, float]]:
    """The output, on q's device, and "us", "min_us", "max_us" and "first_ms" of a call, in a process of its own.

    sets: how many copies of the inputs are used in turn, so that they are not in the L2 cache.
    Raises RuntimeError with the last line of that process's stderr when it fails, ValueError when the tensors are too
    large.
    """
    from safetensors.torch import load_file, save_file

    from .results import child

    given = {"q": q, "k": k, "v": v} | ({"sinks": sinks} if sinks is not None else {})
    if mask is not None and not isinstance(mask, str):
        given["mask"] = mask
    given = {name: x.detach().cpu().contiguous() for name, x in given.items()}
    size = sum(x.numel() * x.element_size() for x in given.values())
    if size > MOST_BYTES:
        raise ValueError(f"too large to be handed to another process: {size / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        save_file(given, Path(folder) / "in.safetensors")
        settings = {"mask": mask if isinstance(mask, str) else None, "scale": scale, "sets": sets}
        (Path(folder) / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        found: dict[str, float] = child("fastattn.bench.peer_mlx", folder, seconds=CHILD_SECONDS)
        return load_file(Path(folder) / "out.safetensors")["out"].to(q.device), found


def main(folder: str) -> dict[str, float]:
    """The child: computes, writes the output beside the inputs, returns the times."""
    mx = import_module("mlx.core")

    settings: dict[str, Any] = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    given: Any = mx.load(str(Path(folder) / "in.safetensors"))
    q, k, v = (given[name] for name in "qkv")
    options = {"scale": settings["scale"], "mask": given.get("mask", settings["mask"])}
    if "sinks" in given:
        options["sinks"] = given["sinks"]
    copies = [(q, k, v)] + [tuple(x + 0 for x in (q, k, v)) for _ in range(settings["sets"] - 1)]
    mx.eval(copies)

    def attend(count: int) -> float:
        begin = time.perf_counter()
        mx.eval([mx.fast.scaled_dot_product_attention(*copies[i % len(copies)], **options) for i in range(count)])
        return time.perf_counter() - begin

    first = attend(1)
    out = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    mx.save_safetensors(str(Path(folder) / "out.safetensors"), {"out": mx.contiguous(out)})
    times = in_rounds(attend, len(copies))
    return {"us": statistics.median(times), "min_us": min(times), "max_us": max(times), "first_ms": first * 1e3}


def in_rounds(attend: Callable[[int], float], sets: int) -> list[float]:
    """Microseconds of a call in each of several rounds, each of as many calls as fill some time."""
    rough = attend(sets) / sets
    count = sets * max(1, math.ceil(ROUND_SECONDS / max(rough, 1e-7) / sets))
    count = min(count, max(sets, 1024))
    return [attend(count) / count * 1e6 for _ in range(ROUNDS)]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
