"""Runs the grid on one backend and writes a line of JSON for each case: `python run_cases.py BACKEND FILE [SKIP]`.

A process of its own, because an illegal access on a GPU ends every later call of its process: the test that started it
reads from the last line which case it was, and goes on with the rest.

    {"case": 17}                                            started
    {"case": 17, "refused": ["has no gradients"]}           or
    {"case": 17, "errors": {"out": 0.4, "dq": 0.3}}         shares of the accepted error, or
    {"case": 17, "failed": "RuntimeError: ..."}
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))  # as pytest does

import torch
from cases import Case, errors, make, reference_results, refusals, run
from grid_cases import GRID


def variant(case: Case) -> Case:
    """The same plan, other data: another scale, lengths in another order."""
    q_lengths, kv_lengths = (x and x[::-1] for x in (case.q_lengths, case.kv_lengths))
    scale = 0.7 / case.head_dim**0.5 if case.scale is None else case.scale
    return case.but(scale=scale, q_lengths=q_lengths, kv_lengths=kv_lengths)


def compare(case: Case, backend: str, device: str, seed: int) -> dict[str, Any]:
    inputs = make(case, device, seed)
    why = refusals(inputs, backend)
    if why:
        return {"refused": why}
    return {"errors": errors(case, inputs, run(inputs, backend), reference_results(inputs, reference=True))}


def outcome(case: Case, backend: str, device: str) -> dict[str, Any]:
    """Both variants' larger errors."""
    seed = zlib.crc32(f"{os.environ.get('FASTATTN_TEST_SEED', '')}{case}".encode())
    found = compare(case, backend, device, seed)
    if "errors" in found:
        again = compare(variant(case), backend, device, seed + 1)["errors"]
        found["errors"] = {name: max(x, again[name]) for name, x in found["errors"].items()}
    return found


def place(error: BaseException) -> str:
    """Where it was raised: the innermost lines."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)


def main(backend: str, file: str, skip: str = "[]", device: str = "cuda") -> None:
    done = set(json.loads(skip))
    with Path(file).open("a", buffering=1) as lines:
        for index, case in enumerate(GRID):
            if index in done:
                continue
            lines.write(json.dumps({"case": index}) + "\n")
            try:
                found = outcome(case, backend, device)
            except Exception as error:
                if device == "cuda":
                    torch.cuda.synchronize()  # raises again, and ends the process, when the GPU is beyond recovery
                what = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                found = {"failed": f"{what} ({place(error)})"}
            lines.write(json.dumps({"case": index, **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
