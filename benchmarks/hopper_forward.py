"""The Hopper forward beside torch's cuDNN and FlashAttention, in one process, in turns; needs an H100.

    python -m benchmarks.hopper_forward [--json FILE] [--quick]

Times are medians in microseconds of GPU work, captured in CUDA graphs: "cold" with the L2 cache flushed before each
call, "hot" over many calls in a row. Beside a call with a mask "dense" is the kernel, and "dense cudnn" torch's, with
as many scores to compute and no mask. "host" is what one call costs the CPU. Takes 4 minutes at most: rows that would
begin later are left out, with a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastattn.bench import output
from fastattn.call import Problem

from .command import end, parser_of, write
from .hopper_rows import ROWS, calls_of, of_lengths, peers
from .turns import FLUSHED, measure

BUDGET = 230.0  #: seconds


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("hopper_forward", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="rows whose name contains one of these")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper_forward: needs a GPU of compute capability 9.0, torch sees none", file=sys.stderr)
        return 2
    from fastattn.backends.triton.binaries.store import shared
    from fastattn.backends.triton.hopper.launch import Forward, flags

    begun = time.monotonic()
    torch.manual_seed(0)
    names = [name for name in ROWS if any(text in name for text in arguments.only.split(","))]
    # The binaries first, side by side.
    wanted = set()
    for name in names:
        for call in calls_of(name)[:2]:
            if call is not None:
                wanted.add(flags(Problem.of(call), None if call.sinks is None else call.sinks.dtype))
        del call
    for flags_of_one, why in shared.make_all(wanted, torch.cuda.current_device()):
        if why:
            raise RuntimeError(f"{flags_of_one}: {why}")
    print(f"{len(wanted)} binaries after {time.monotonic() - begun:.0f} s", flush=True)
    found: dict[str, Any] = {"benchmark": "hopper forward", "unit": "us", "rows": {}}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    print(f"{'':24}" + "".join(f"{x:>22}" for x in ("ours cold/hot/host", "cudnn", "flash")) + "  to the best")
    try:
        for name in names:
            if time.monotonic() - begun > BUDGET:
                print(f"{name:24} left out: no time")
                found["rows"][name] = None
                continue
            call, same, mask = calls_of(name)
            runs: dict[str, Callable[[], Any]] = {"ours": partial(Forward(Problem.of(call), call), call)}
            runs |= peers(call, ROWS[name][1], mask)
            if same is not None:
                runs["dense"] = partial(Forward(Problem.of(same), same), same)
                runs["dense cudnn"] = peers(same, {"causal": same.right == 0}, None)["cudnn"]
            found["rows"][name] = measure(runs, flush, 5 if arguments.quick else 15, ("ours",))
            print(line_of(name, found["rows"][name]), flush=True)
            del call, same, mask, runs
    finally:  # what there is, should a row fail
        found["lengths"] = of_lengths(found["rows"])
        write(arguments.json, "hopper_forward", argv, torch.device("cuda"), found)
    print(f"drawn lengths, hot, to cudnn: {found['lengths']}\n{time.monotonic() - begun:.0f} s")
    return 0


def line_of(name: str, row: dict[str, dict[str, float]]) -> str:
    """A row of the table that is printed."""
    cells = []
    for peer in ("ours", "cudnn", "flash"):
        near, times = ("", row[peer]) if peer in row else ("~", row.get("~" + peer, {}))
        three = "/".join(f"{times[x]:.0f}" if times[x] >= 100 else f"{times[x]:.1f}" for x in times)
        cells.append(f"{near + three if three else '-':>22}")
    best = min((row[x]["cold"] for x in row if x != "ours"), default=float("nan"))
    return f"{name:24}{''.join(cells)}  {row['ours']['cold'] / best:.2f}"


if __name__ == "__main__":
    end(main)
