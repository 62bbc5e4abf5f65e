"""What the commands `python -m benchmarks.NAME` share: how they end, where they write, and what they write first."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.bench import results
from fastattn.cli.arguments import add_json
from fastattn.common.printable import printable
from fastattn.config import is_on


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
