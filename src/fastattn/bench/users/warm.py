"""Compiles the kernels that rows need, side by side, before anything is measured:
`python -m fastattn.bench.users.warm DEVICE ROW ...`.

In a process of its own, which takes its tensors and the loaded kernels with it: what is left is on disk, where the
processes that measure find it. Its last line is JSON: "kernels" that the rows need, "compiled" of them now, "failed"
(texts), "seconds".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...backends.base import Compiled
from ...backends.triton.binaries import store
from ...backends.triton.binaries.flag_set import FlagSet
from ...call import Problem
from ...counters import stats
from ...dispatch import registry, routes
from ...dispatch.native import calls as native
from ...validation import Arguments, validated
from .calls import Row
from .rows import BY_NAME


def flag_sets(rows: Iterable[Row], device: torch.device) -> list[FlagSet]:
    """Of the backends that serve the rows once their kernels are there; each once."""
    return list(dict.fromkeys(flags for row in rows for flags in _of(row, device)))


def _of(row: Row, device: torch.device) -> list[FlagSet]:
    x = row.tensors(device)[0].with_gradients(row)
    problem = Problem.of(validated(Arguments(x.q, x.k, x.v, **row.ours(x))))
    found: list[FlagSet] = []
    for one in (problem, replace(problem, backward=True)) if row.training else (problem,):
        first = routes.first_choice(one, registry.allowed())
        if isinstance(first, Compiled):
            found += first.binaries(one)
    return found


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The process."""
    begun, device = time.monotonic(), torch.device(argv[0])
    rows = [BY_NAME[name] if device.type == "cuda" else BY_NAME[name].reduced() for name in argv[1:]]
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        native.start()
    every = flag_sets(rows, device)
    failed = [f"{flags}: {why}" for flags, why in store.shared.make_all(every, device.index) if why]
    if device.type == "cuda":
        native.wait()
    compiled = int(stats()["binaries"]["compiles"])
    seconds = round(time.monotonic() - begun, 1)
    return {"kernels": len(every), "compiled": compiled, "failed": failed, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
