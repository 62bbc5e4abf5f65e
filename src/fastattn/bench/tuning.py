"""What the commands share that measure, on this GPU, the rules which are kept as data."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import output, results

Rows = list[dict[str, Any]]


def run(
    name: str, description: str | None, method: str, measure: Callable[[torch.device], Rows], argv: Sequence[str] | None
) -> int:
    """The command `python -m fastattn.bench.NAME [--json FILE]`. Returns the exit status.

    measure: prints what it finds on a device and returns it; the current stream can be captured.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=f"python -m fastattn.bench.{name}", description=description)
    output.add_json(parser.add_argument)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"{name}: needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 2
    output.check([arguments.json])
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        rows = measure(device)
    if arguments.json:
        command = shlex.join(["python", "-m", f"fastattn.bench.{name}", *argv])
        report = results.header(name, command, device)
        report |= {"method": method, "seconds": time.perf_counter() - begin, "rows": rows}
        results.write_json(arguments.json, report)
    return 0
