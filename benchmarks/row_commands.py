"""What `forward` and `backward` share: calls of rows, the arguments, and what is printed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fastattn.bench.timing import text_of
from fastattn.bench.users.calls import Row
from fastattn.call import Call
from fastattn.validation import Arguments, validated

from .command import captured, parser_of
from .turns import best


def call_of(row: Row, device: torch.device) -> Call:
    """The call of a row, with the gradients that it asks for."""
    (x,) = row.tensors(device)
    call = validated(Arguments(x.q, x.k, x.v, **row.ours(x)), None)
    return call._replace(grads="qkv" + "m" * row.mask_gradient) if row.training else call


def row_parser(name: str, description: str | None, tunes: str) -> argparse.ArgumentParser:
    """The parser of such a command. tunes: what --tune tries."""
    found = parser_of(name, description)
    found.add_argument("rows", nargs="*", metavar="ROW")
    found.add_argument("--tune", action="store_true", help=tunes)
    found.add_argument("--rounds", type=int, default=7, help="samples of each time (default: 7)")
    found.add_argument("--check", action="store_true", help="compile and compare alone")
    found.add_argument("--time", action="store_true", help="without comparing")
    found.add_argument("--seconds", type=float, default=1e9, help="rows that would begin later are left out")
    return found


def in_time(rows: Sequence[Row], begun: float, seconds: float) -> Iterator[Row]:
    """The rows, one by one, until the time is up; then a line for each that is left out."""
    for row in rows:
        if time.monotonic() - begun > seconds:
            print(f"{row.name:24} left out: no time")
        else:
            yield row


def tuned(runs: Iterable[tuple[str, Callable[[], Callable[[], Any]]]]) -> dict[str, float]:
    """Hot microseconds of calls by name, the quickest first. Each is bound and compiled when its turn comes; what
    cannot run is left out, with a line."""
    found = {}
    for name, bind in runs:
        try:
            found[name] = best(captured(bind(), 2))
        except Exception as failure:
            print(f"{name}: {text_of(failure)[:140]}", file=sys.stderr)
    return dict(sorted(found.items(), key=lambda x: x[1]))


def report(name: str, times: dict[str, dict[str, float]], checks: dict[str, Any]) -> None:
    """Prints what was found of a row."""
    print(line_of(name, times, checks) if times else f"{name:24} {checks}", flush=True)
    failed = {who: x["failed"] for who, x in checks.items() if "failed" in x}
    if failed:
        print(f"{'':24} {failed}")


def line_of(name: str, row: dict[str, dict[str, float]], errors: dict[str, Any]) -> str:
    """A row of the table that is printed: cold/hot/host, and the error of ours."""
    cells = []
    for who, times in row.items():
        error = errors.get(who, {}).get("error")
        figures = "/".join(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in times.values())
        cells.append(f"{who} {figures}" + ("" if error is None else f" ({error:.0e})"))
    return f"{name:24} " + "  ".join(cells)
