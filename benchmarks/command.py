"""What the commands `python -m benchmarks.NAME` share: how they end, where they write, and what they write first."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.bench import results
from fastattn.cli.arguments import add_json
from fastattn.cli.terminal import guarded
from fastattn.common.printable import printable


def end(main: Callable[[], int]) -> None:
    """Runs a command and exits as `fastattn` does: with one line for an error, and its status."""
    sys.exit(guarded(main))


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


def captured(call: Callable[[], Any], warmups: int = 3) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks events meanwhile
        call()
    return graph.replay
