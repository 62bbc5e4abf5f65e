"""`fastattn sweep [NAME]`: figures of single attention calls, next to torch's own attention, in one process."""

from __future__ import annotations

import argparse
import math
import shlex
from typing import Any

from ..common.printable import printable
from .arguments import add_json, path_of

NAMES = ("decode", "backward")
USERS = "users"
ALL = "op"  #: the sweep without a name


def add_command(commands: Any) -> None:
    """Adds `sweep` to the subcommands of an argparse parser."""
    text = (
        "Time single attention calls on a GPU: fastattn's, torch's own and those of other packages that are installed, "
        "in turns, checked against the reference. Without NAME: every phase of a model's life. decode: few queries "
        "against a long cache. backward: training. users: calls as users of all kinds make them, beside "
        "every peer that can make them; ROW ...: those in whose names one of the words is."
    )
    parser = commands.add_parser("sweep", help="attention calls against torch's own and others", description=text)
    add = parser.add_argument
    names = (*NAMES, USERS, ALL)
    add("name", choices=names, nargs="?", default=ALL, metavar="NAME", help="only decode or backward; users")
    add("rows", nargs="*", metavar="ROW", help="users: words of the names of rows")
    add_json(add)
    add("--plot", type=path_of, metavar="FILE", help="draw the times to FILE: .png, .svg or .pdf (extra bench)")
    add("--quick", action="store_true", help="a few rows of each kind; users: fewer rounds")
    add("--device", metavar="DEVICE", help="cuda or cuda:N; cpu runs tiny shapes, to try the command out")
    add("--seed", type=int, default=0, metavar="N", help="of the inputs and the lengths that are drawn (%(default)s)")
    add("--check", action="store_true", help="users: compile and compare, without times")
    add("--flex", action="store_true", help="users: flex attention takes part (it compiles for seconds a row)")
    add("--absent", action="append", default=[], metavar="NAME=WHY", help="users: why a package is not installed")
    add("--seconds", type=float, metavar="N", help="users: rows that would begin later are left out")
    add("--warm", action="store_true", help="users: compile all kernels first, on all cores")
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
    if arguments.name == USERS:
        return _users(arguments, command, device)
    given = (arguments.rows, arguments.check, arguments.flex, arguments.absent, arguments.warm)
    if any(given) or arguments.seconds is not None:
        raise ValueError('ROW, --check, --flex, --absent, --seconds, --warm: expected "sweep users" with them')
    found, failed = sweeps.run(sweeps.SWEEPS[arguments.name], command, device, arguments.quick, arguments.seed)
    if arguments.json:
        results.write_json(arguments.json, found)
        print(printable(f"Wrote {arguments.json}"))
    if arguments.plot:
        output.write(arguments.plot, plot.drawn(found, arguments.plot))
        print(printable(f"Wrote {arguments.plot}"))
    return int(failed)


def _users(arguments: argparse.Namespace, command: str, device: Any) -> int:
    from ..bench.users import rows, run

    if arguments.plot:
        raise ValueError("--plot: expected another sweep, users has no plot (python -m benchmarks.site makes a page)")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise ValueError(f"--seconds: expected a number of seconds over 0, got {arguments.seconds}")
    for text in arguments.absent:
        if "=" not in text:
            raise ValueError(f"--absent: expected NAME=WHY, got {text!r}")
    options = (arguments.quick, arguments.check, arguments.flex, tuple(arguments.absent), arguments.seconds)
    asked = run.Settings(device, *options, arguments.warm)
    _, failed = run.run(rows.chosen(arguments.rows), asked, command, arguments.json)
    if arguments.json:
        print(printable(f"Wrote {arguments.json}"))
    return int(failed)
