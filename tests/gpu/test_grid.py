"""Every backend on the whole grid against the float64 reference, with one table of all that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grid_cases import GRID, GROUPS, must_serve

pytestmark = pytest.mark.gpu

RUNNER = Path(__file__).with_name("run_cases.py")
MAX_CRASHES = 5  #: then it is not one bad case
TIMEOUT = 280  #: seconds


#: backend -> the run's environment and the groups it covers, None for all. A cuDNN plan for one exact shape is what
#: masks always get; the other calls get one only on request.
RUNS: dict[str, tuple[str, dict[str, str], tuple[str, ...] | None]] = {
    "decode": ("decode", {}, None),
    "cudnn": ("cudnn", {}, None),
    "cudnn-exact": ("cudnn", {"FASTATTN_PLANS": "exact"}, ("square", "rectangles", "dims", "windows")),
    "torch": ("torch", {}, None),
    "reference": ("reference", {}, None),
}

#: Processes of a run; more for what takes longest.
SHARDS = {"cudnn": 5, "cudnn-exact": 2, "torch": 3}


def run_grid(backend: str, file: Path, environment: dict[str, str], leave: set[int]) -> dict[int, dict[str, Any]]:
    """Case index -> its outcome; a case that took its process down has failed. leave: cases not to run."""
    found: dict[int, dict[str, Any]] = {}
    for _ in range(MAX_CRASHES + 1):
        command = [sys.executable, str(RUNNER), backend, str(file), json.dumps(sorted(leave | found.keys()))]
        try:
            done = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, -1, "", f"still running after {TIMEOUT} s")
        found = {}
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            index = entry.pop("case")
            found[index] = found.get(index, {}) | entry
        if done.returncode == 0:
            return found
        flight = [index for index, entry in found.items() if not entry]
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        assert flight, f"{backend}: the runner ended with status {done.returncode}: {done.stderr[-2000:]}"
        death = f"its process died with status {done.returncode}: {last[:200]}"
        with file.open("a") as lines:
            lines.writelines(json.dumps({"case": index, "failed": death}) + "\n" for index in flight)
        found |= {index: {"failed": death} for index in flight}
    return found


def table(rows: list[tuple[Any, ...]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell!s:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)


def left_out(groups: tuple[str, ...] | None) -> set[int]:
    """Indices of the cases that a run does not cover."""
    wanted = set(GRID if groups is None else (case for group in groups for case in GROUPS[group]))
    return {index for index, case in enumerate(GRID) if case not in wanted}


def run_shards(name: str, folder: Path) -> dict[int, dict[str, Any]]:
    """A run of the grid, its cases dealt to as many processes as SHARDS says."""
    backend, environment, groups = RUNS[name]
    left, count = left_out(groups), SHARDS.get(name, 1)
    with ThreadPoolExecutor(count) as pool:
        parts = [
            pool.submit(
                run_grid,
                backend,
                folder / f"{name}-{i}.jsonl",
                environment,
                left | {index for index in range(len(GRID)) if index % count != i},
            )
            for i in range(count)
        ]
        return {index: entry for part in parts for index, entry in part.result().items()}


_started: dict[str, Future[dict[int, dict[str, Any]]]] = {}


def start() -> dict[str, Future[dict[int, dict[str, Any]]]]:
    """Starts all runs at once, or finds them started: they mostly wait for cuDNN and Triton to compile."""
    if not _started:
        folder = Path(tempfile.mkdtemp(prefix="fastattn-grid-"))
        pool = ThreadPoolExecutor(len(RUNS))
        _started.update({name: pool.submit(run_shards, name, folder) for name in RUNS})
        pool.shutdown(wait=False)
    return _started


@pytest.mark.parametrize("name", RUNS)
def test_grid(name: str) -> None:
    backend, _, groups = RUNS[name]
    leave = left_out(groups)
    found = start()[name].result()
    wrong: list[tuple[Any, ...]] = []
    served: Counter[str] = Counter()
    for index, case in enumerate(GRID):
        if index in leave:
            continue
        entry = found.get(index, {"failed": "not run: too many crashes before it"})
        if "refused" in entry:
            if must_serve(backend, case):
                wrong.append((backend, case, "refused: " + "; ".join(entry["refused"])))
        elif "errors" in entry and max(entry["errors"].values()) <= 1:
            served.update([case.mask_kind, *_features(case)])
        else:
            text = entry.get("failed") or ", ".join(f"{n} {x:.3g}" for n, x in entry["errors"].items())
            wrong.append((backend, case, text))
    counts = table([("feature", "cases right"), *sorted(served.items())])
    print(counts)
    total = len(GRID) - len(leave)
    assert not wrong, f"{len(wrong)} of {total} cases (errors: shares of what is accepted):\n{table(wrong)}\n\n{counts}"
    assert sum(served.values()), "nothing was served"


def _features(case: Any) -> list[str]:
    features = ("sinks", "window", "softcap", "q_lengths", "kv_lengths", "return_lse", "grads")
    return [name for name in features if getattr(case, name)]
