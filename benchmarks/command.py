"""What the commands `python -m benchmarks.NAME` share: how they end, where they write, and what they write first."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.bench import output, results
from fastattn.cli.arguments import add_json
from fastattn.common.printable import printable
from fastattn.common.table import table
from fastattn.config import is_on

Rows = list[dict[str, Any]]


def end(main: Callable[[], int]) -> None:
    """Runs a command and exits as `fastattn` does: 2 after a ValueError (bad input), 1 for a file not written."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        if is_on("FASTATTN_DEBUG", False):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {printable(str(error))}", file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)


def parser_of(name: str, description: str | None, program: str = "python") -> argparse.ArgumentParser:
    """The parser of a command, with `--json`."""
    parser = argparse.ArgumentParser(
        prog=f"{program} -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json(parser.add_argument)
    return parser


def write(
    path: str | None,
    name: str,
    argv: Sequence[str],
    device: torch.device,
    found: dict[str, Any],
    program: str = "python",
) -> None:
    """Writes a result file, if there is a path: the header of every result, then what was found."""
    if path:
        command = f"{program} -m benchmarks.{name} {shlex.join(argv)}".rstrip()
        results.write_json(path, results.header(name, command, device) | found)
        print(printable(f"Wrote {path}"))


def tune(
    name: str,
    description: str | None,
    method: str,
    head: Sequence[str],
    measure: Callable[[torch.device], Rows],
    cells: Callable[[dict[str, Any]], Sequence[str]],
    argv: Sequence[str] | None,
) -> int:
    """A command that measures, on this GPU, what the package keeps as data. Returns the exit status.

    measure: returns rows; the current stream can be captured. head, cells: the table of them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser_of(name, description).parse_args(argv)
    if not torch.cuda.is_available():
        print(f"{name}: needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 2
    output.check([arguments.json])
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        rows = measure(device)
    print(table(head, [cells(row) for row in rows]))
    write(arguments.json, name, argv, device, {"method": method, "seconds": time.perf_counter() - begin, "rows": rows})
    return 0
