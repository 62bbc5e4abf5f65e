"""`fastattn sweep [NAME]`: figures of single attention calls, next to torch's own attention, in one process."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..common.printable import printable
from .arguments import add_json, path_of

NAMES = ("decode", "backward")
ALL = "op"  #: the sweep without a name


def add_command(commands: Any) -> None:
    """Adds `sweep` to the subcommands of an argparse parser."""
    text = (
        "Time single attention calls on a GPU: fastattn's, torch's own and those of other packages that are installed, "
        "in turns, checked against the reference. Without NAME: every phase of a model's life. decode: few queries "
        "against a long cache. backward: training."
    )
    parser = commands.add_parser("sweep", help="attention calls against torch's own and others", description=text)
    add = parser.add_argument
    add("name", choices=(*NAMES, ALL), nargs="?", default=ALL, metavar="NAME", help="only decode or backward")
    add_json(add)
    add("--plot", type=path_of, metavar="FILE", help="draw the times to FILE: .png, .svg or .pdf (extra bench)")
    add("--quick", action="store_true", help="a few rows of each kind")
    add("--device", metavar="DEVICE", help="cuda or cuda:N; cpu runs tiny shapes, to try the command out")
    add("--seed", type=int, default=0, metavar="N", help="of the inputs and the lengths that are drawn (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, or 1 when some row could not be measured or fastattn failed in it.

    Raises ValueError for a device that is not there, a file that cannot be written, or a negative seed; ImportError
    for a plot without matplotlib.
    """
    from ..bench import output, plot, results, sweeps
    from ..lm.loading.device import pick_device

    output.check([arguments.json, arguments.plot])
    if arguments.plot:
        plot.check(arguments.plot)
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed: expected 0 or more, got {arguments.seed}")
    device = pick_device(arguments.device)
    if device.type == "cpu" and arguments.device is None:
        raise ValueError(
            "sweep: expected an NVIDIA GPU, torch sees none (--device cpu tries the command on tiny shapes)"
        )
    command = shlex.join(["fastattn", *arguments.argv])
    found, failed = sweeps.run(sweeps.SWEEPS[arguments.name], command, device, arguments.quick, arguments.seed)
    if arguments.json:
        results.write_json(arguments.json, found)
        print(printable(f"Wrote {arguments.json}"))
    if arguments.plot:
        output.write(arguments.plot, plot.drawn(found, arguments.plot))
        print(printable(f"Wrote {arguments.plot}"))
    return int(failed)
