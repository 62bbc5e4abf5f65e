"""One page of result files, for a reader who has never seen the code:

    python -m benchmarks.report FILE.json ... --html FILE [--picture SLUG FILE]

The page is one HTML file: pictures as SVG, no scripts, nothing fetched; `--picture` writes one of them by itself. The
templates escape what a result file says. Needs no GPU. A wrong file gives one line and status 2, before anything is
written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastattn.bench import output
from fastattn.cli.arguments import path_of
from fastattn.cli.terminal import guarded
from fastattn.common.printable import printable

from . import plots
from .data import Section
from .reading import load
from .sections import ABOUT, drawn, sections_of


def page(sections: Sequence[Section]) -> str:
    """The whole document."""
    pictures = drawn(sections, lambda chart, _: Markup(plots.svg(chart)))  # whose text matplotlib has escaped
    return render("page.html", sections, pictures)


def render(template: str, sections: Sequence[Section], pictures: dict[str, Any]) -> str:
    """A template's text; what is filled in is escaped. pictures: markup by slug."""
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(sections=sections, about=ABOUT, pictures=pictures)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return guarded(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=path_of, metavar="FILE.json", help="what --json FILE wrote")
    parser.add_argument("--html", type=path_of, required=True, metavar="FILE", help="the page")
    parser.add_argument("--picture", type=path_of, nargs=2, metavar=("SLUG", "FILE"), help="one picture of it, as PNG")
    arguments = parser.parse_args(argv)
    slug, file = arguments.picture or (None, None)
    output.check([arguments.html, file], inputs=arguments.files)
    sections = sections_of({path: load(path) for path in arguments.files})
    made: dict[Any, str | bytes] = {arguments.html: page(sections)}
    if slug:
        found = [(chart, section.caption) for section in sections for chart in section.charts if chart.slug == slug]
        if not found:
            raise ValueError(f"--picture: expected the id of a figure of the page, got {slug}")
        made[file] = plots.picture(*found[0], format="png", dpi=150, metadata={"Software": None})
    for path, data in made.items():
        output.write(path, data)
        print(printable(f"Wrote {path}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
