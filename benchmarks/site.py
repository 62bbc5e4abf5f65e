"""The documentation's page of benchmarks, from the result files that are kept: `python -m benchmarks.site [DOCS]`.

Writes DOCS/benchmarks.md and its pictures, DOCS/benchmarks/*.svg; git ignores both, `make docs` makes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from fastattn.bench import output

from .command import end
from .report import plots
from .report.__main__ import render
from .report.reading import load
from .report.sections import drawn, sections_of

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status. Pictures that were there before are removed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.site", description=__doc__)
    parser.add_argument("docs", nargs="?", type=Path, default=HERE.parent / "docs", help="folder (%(default)s)")
    docs = parser.parse_args(sys.argv[1:] if argv is None else argv).docs
    files = sorted((HERE / "results").glob("*/*.json"))
    sections = sections_of({str(path): load(path) for path in files})
    pictures = drawn(sections, lambda chart, _: plots.svg(chart))
    image = Markup('<p><img alt="{}" src="benchmarks/{}.svg"></p>')
    images = drawn(sections, lambda chart, _: image.format(chart.title, chart.slug))
    text = render("benchmarks.md", sections, images)
    folder = docs / "benchmarks"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for slug, picture in pictures.items():
        output.write(folder / f"{slug}.svg", f"{picture}\n")
    output.write(docs / "benchmarks.md", text)
    print(f"Wrote {docs / 'benchmarks.md'} from {len(files)} result files")
    return 0


if __name__ == "__main__":
    end(main)
