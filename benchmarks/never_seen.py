"""Calls of shapes never seen before: `python -m benchmarks.never_seen [--json FILE] [--quick] [--device cpu]`.

In a process with nothing on disk, `fastattn.warmup` for some families; then calls of random shapes, no shape twice, all
features mixed, and training steps of the same kind: what was built or compiled while a caller waited, and the slowest
calls. Then new processes over what is on disk now: milliseconds from the end of `import torch` to the first result.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from fastattn.bench import output, results
from fastattn.lm.loading.device import pick_device

from .command import end, parser_of, write
from .never_seen_calls import FULL, QUICK, TINY
from .warm_process import KINDS

CALL_SECONDS, PROCESS_SECONDS = 1800, 120
PROCESSES = 3  #: of each kind of first call
_SETTINGS = ("FASTATTN_COMPILE", "FASTATTN_PLANS")  #: are left at their defaults
METHOD = {
    "calls": "milliseconds of one call each (training: forward and backward), synchronized; builds and compiles: plans "
    "and binaries that a caller waited for, background: those that nobody waited for",
    "first call": "milliseconds in a new process, median of several: `cuda` from the end of `import torch` until the "
    "inputs are on the GPU, `import` of fastattn, `call` until the result is there; `again` the same call once more. "
    "`ours` is import and call",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 where a caller waited for a build or a compiler in spite of the warmup."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("never_seen", __doc__)
    parser.add_argument("--quick", action="store_true", help="one family and fewer calls")
    parser.add_argument("--device", help="cuda or cuda:N; cpu runs tiny shapes, to try the command out")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the shapes (%(default)s)")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    device = pick_device(arguments.device)
    sizes = TINY if device.type == "cpu" else QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        variables = {key: value for key, value in os.environ.items() if key not in _SETTINGS}
        variables["FASTATTN_PLAN_CACHE"] = os.path.join(folder, "plans")
        variables["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        given = sizes.name, str(device), str(arguments.seed)
        calls = results.child("benchmarks.never_seen_calls", *given, seconds=CALL_SECONDS, env=variables)
        print(_calls_text(calls))
        first = [_first_call(kind, sizes.name, str(device), variables) for kind in KINDS]
    for row in first:
        print("first call, {kind}: {ours_ms:.0f} ms (import {import_ms:.0f}, call {call_ms:.0f}), cuda {cuda_ms:.0f}"
              .format(**row))  # fmt: skip
    write(arguments.json, "never_seen", argv, device, {"method": METHOD, "calls": calls, "first_call": first})
    return int(calls["builds"] + calls["compiles"] > 0)


def _first_call(kind: str, sizes: str, device: str, variables: dict[str, str]) -> dict[str, Any]:
    """Medians over processes."""
    every = [
        results.child("benchmarks.warm_process", kind, sizes, device, seconds=PROCESS_SECONDS, env=variables)
        for _ in range(1 if sizes == TINY.name else PROCESSES)
    ]
    row: dict[str, Any] = {"kind": kind}
    for name in every[0]:
        values = [found[name] for found in every]
        row[name] = round(statistics.median(values), 2) if name.endswith("_ms") else values[-1]
    row["ours_ms"] = round(row["import_ms"] + row["call_ms"], 2)
    return row


def _calls_text(calls: dict[str, Any]) -> str:
    lines = [
        f"warmup: {calls['warmup_ms'] / 1e3:.1f} s, {calls['warmup_compiled']} kernels, {calls['warmup_built']} plans",
        f"{calls['count']} calls and {calls['steps']} with gradients: {calls['builds']} builds and {calls['compiles']} "
        f"compiles while a caller waited, "
        f"{calls['background_builds']} and {calls['background_compiles']} in the background",
    ]
    lines += [
        f"  {name}{row['feature']}: {row['count']} calls, {row['builds']} builds, {row['compiles']} compiles, median "
        f"{row['median_ms']:.2f} ms, worst {row['worst_ms']:.1f} ms, by {', '.join(row['served_by'])}"
        for name, key in (("", "features"), ("training, ", "training"))
        for row in calls[key]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    end(main)
