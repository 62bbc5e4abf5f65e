"""`fastattn report`: one HTML page or pictures from result files. Needs no GPU."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_report_outputs, path_of


def add_command(commands: Any) -> None:
    """Adds `report` to the subcommands of an argparse parser."""
    text = "Make a page or pictures from result files (what --json wrote). Needs no GPU."
    parser = commands.add_parser("report", help="pictures and a page from result files", description=text)
    text = "what --json of sweep or benchmark wrote"
    parser.add_argument("files", nargs="+", type=path_of, metavar="FILE.json", help=text)
    add_report_outputs(parser.add_argument)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for files that are no results, or nothing to write."""
    from ..bench.reading import load
    from ..bench.report import page

    if not (arguments.html or arguments.plots):
        raise ValueError("report: expected --html FILE or --plots DIR: what should be written?")
    page.check_outputs(arguments.html, arguments.plots, inputs=arguments.files)
    page.write({path: load(path) for path in arguments.files}, arguments.html, arguments.plots)
    return 0
