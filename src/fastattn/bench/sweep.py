"""`fastattn sweep [NAME]`: figures of single attention calls, next to torch's own attention, in one process.

Without a name: the op in every phase, against torch and whatever else is installed (`sweep_op.py`). plans: any-length
plans against exact ones, host cost, fresh lengths, first calls. decode: few queries against a long cache. backward:
training. Everything is timed in turns and checked against the reference; see the METHOD of each module, which the JSON
repeats.
"""

from __future__ import annotations

import argparse
import shlex
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..common.printable import printable
from . import output, report_html, results
from .table import ratio, table

if TYPE_CHECKING:
    from .rows import Row, Sweep

NAMES = ("plans", "decode", "backward")
ALL = "op"  #: the sweep without a name


def add_command(commands: Any) -> None:
    """Adds `sweep` to the subcommands of an argparse parser."""
    text = (
        "Time single attention calls on a GPU: fastattn's, torch's own and those of other packages that are installed, "
        "in turns, checked against the reference. Without NAME: every phase of a model's life."
    )
    parser = commands.add_parser("sweep", help="attention calls against torch's own and others", description=text)
    add = parser.add_argument
    add("name", choices=(*NAMES, ALL), nargs="?", default=ALL, metavar="NAME", help="only plans, decode or backward")
    report_html.add_outputs(parser)
    output.add_json(add)
    add("--quick", action="store_true", help="a few rows of each kind")
    add("--device", metavar="DEVICE", help="cuda or cuda:N; cpu runs tiny shapes, to try the command out")
    add("--seed", type=int, default=0, metavar="N", help="of the inputs and the lengths that are drawn (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, or 1 when some row could not be measured or fastattn failed in it.

    Raises ValueError for a device that is not there, a file that cannot be written, or a negative seed.
    """
    import torch

    from ..lm.loading.device import pick_device
    from .rows import Sweep

    report_html.check_outputs(arguments, [arguments.json])
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed: expected 0 or more, got {arguments.seed}")
    device = pick_device(arguments.device)
    if device.type == "cpu" and arguments.device is None:
        raise ValueError(
            "sweep: expected an NVIDIA GPU, torch sees none (--device cpu tries the command on tiny shapes)"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    module = import_module(f".sweep_{arguments.name}", __package__)
    sweep = Sweep(device, arguments.quick, arguments.seed, _say)
    begin = time.perf_counter()
    if device.type == "cuda":
        # Not on the default stream: that one cannot be captured, and a backward runs on the stream of its forward.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            module.run(sweep)
    else:
        module.run(sweep)
    seconds = time.perf_counter() - begin
    for name, rows in sweep.sections.items():
        print(f"\n{name}\n{section_table(rows)}", flush=True)
    if sweep.left_out:
        print(f"\nLeft out, they need a GPU: {', '.join(sorted(sweep.left_out))}")
    found = report(sweep, module.METHOD, arguments, seconds)
    if arguments.json:
        results.write_json(arguments.json, found)
        print(printable(f"Wrote {arguments.json}"))
    report_html.write_outputs(arguments, {arguments.json or f"sweep-{arguments.name}": found})
    return int(sweep.failed)


def report(sweep: Sweep, method: dict[str, str], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """All of it for a JSON file, with the environment of this process and the command that was run."""
    from .. import stats

    command = shlex.join(["fastattn", *arguments.argv])
    more = {}
    if arguments.name == ALL:
        from .sweep_op import about_peers

        more["peers"] = about_peers()
    return (
        results.header(f"sweep {arguments.name}", command, sweep.device)
        | more
        | {
            "arguments": {
                "name": arguments.name,
                "quick": arguments.quick,
                "device": str(sweep.device),
                "seed": arguments.seed,
                "dtype": "bfloat16",
            },
            "method": method,
            "left_out": sorted(sweep.left_out),
            "seconds": seconds,
            "stats": stats(),
            "sections": sweep.sections,
        }
    )


def section_table(rows: list[Row]) -> str:
    """The rows under the implementations' names (microseconds), the figures' and the ratios'."""
    parts = ("implementations", "figures", "ratios")
    keys = {part: list(dict.fromkeys(key for row in rows for key in row.get(part, {}))) for part in parts}
    head = ["", *keys["implementations"], *keys["figures"], *keys["ratios"]]
    lines = []
    for row in rows:
        times = [row.get("implementations", {}).get(name, {}).get("us") for name in keys["implementations"]]
        figures = [row.get("figures", {}).get(key) for key in keys["figures"]]
        ratios = [row.get("ratios", {}).get(key) for key in keys["ratios"]]
        lines.append([row["label"], *map(_us, times), *map(_figure, figures), *(ratio(value, 1.0) for value in ratios)])
    return table(head, lines)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _say(line: str) -> None:
    print(line, flush=True)  # a pipe gets each line when it is true, not at the end
