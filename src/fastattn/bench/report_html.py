"""One HTML file that says what was measured, to somebody who has never seen the code: `fastattn report`.

Everything is in the file: pictures as SVG, no scripts, nothing fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..common.printable import printable
from . import output, plots, report_markdown
from .chapters import ABOUT, Chapter, caption_of, chapters_of, drawn
from .charts import Chart, Table
from .reading import load, reading

STYLE = Path(__file__).with_name("report.css")


def add_command(commands: Any) -> None:
    """Adds `report` to the subcommands of an argparse parser."""
    text = "Make a page, pictures or markdown from result files (what --json wrote). Needs no GPU."
    parser = commands.add_parser("report", help="pictures and pages from result files", description=text)
    parser.add_argument(
        "files", nargs="+", type=output.path_of, metavar="FILE.json", help="what --json of sweep or benchmark wrote"
    )
    add_outputs(parser)
    parser.add_argument(
        "--markdown",
        type=output.path_of,
        metavar="FILE",
        help="the same as markdown, its pictures in a folder beside it",
    )
    parser.set_defaults(run=run)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Adds --html and --plots."""
    parser.add_argument(
        "--html", type=output.path_of, metavar="FILE", help="write one page with tables and pictures to FILE"
    )
    parser.add_argument("--plots", type=output.path_of, metavar="DIR", help="write the pictures as PNG to DIR")


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for files that are no results, or nothing to write."""
    if not (arguments.html or arguments.plots or arguments.markdown):
        raise ValueError("report: expected --html FILE, --plots DIR or --markdown FILE: what should be written?")
    check_outputs(arguments, inputs=arguments.files)
    write_outputs(arguments, {path: load(path) for path in arguments.files})
    return 0


def check_outputs(arguments: argparse.Namespace, more: Iterable[str | None] = (), inputs: Iterable[str] = ()) -> None:
    """Before a long run: raises ValueError or ImportError when what is asked for could not be written after it.

    more: other files that are written; inputs: what is read.
    """
    page = getattr(arguments, "markdown", None)
    folders = [arguments.plots, report_markdown.folder_of(page) if page else None]
    output.check([arguments.html, page, *more], folders, inputs)
    if arguments.html or arguments.plots or page:
        plots.check_here()


def write_outputs(arguments: argparse.Namespace, found: Mapping[str, dict[str, Any]]) -> None:
    """Writes what --html, --plots and --markdown ask for, of result files by name. Everything is drawn before anything
    is written. Raises ValueError for a file that is not like ours."""
    markdown = getattr(arguments, "markdown", None)
    if not (arguments.html or arguments.plots or markdown):
        return
    chapters = chapters_of(found)
    text = page(chapters) if arguments.html else ""
    pictures = drawn(chapters, lambda chart, chapter: plots.png(chart, caption_of(chapter))) if arguments.plots else {}
    if markdown:
        report_markdown.write_markdown(markdown, chapters)
    if arguments.plots:
        Path(arguments.plots).mkdir(parents=True, exist_ok=True)
        for slug, picture in pictures.items():
            output.write(Path(arguments.plots) / f"{slug}.png", picture, follow=False)
        print(printable(f"Wrote {len(pictures)} pictures to {arguments.plots}"))
    if arguments.html:
        output.write(arguments.html, text)
        print(printable(f"Wrote {arguments.html}"))
    if markdown:
        print(printable(f"Wrote {markdown}"))


def page(chapters: Sequence[Chapter]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{escape(c.name)}">{escape(c.title)} ({escape(c.name)})</a>' for c in chapters)
    body = "\n".join(_article(chapter) for chapter in chapters)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastattn: measured</title><style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><main>
<h1>fastattn: measured</h1>
<p>{escape(ABOUT)}</p>
<nav>{links if len(chapters) > 1 else ""}</nav>
{body}
</main></body></html>
"""


def _article(chapter: Chapter) -> str:
    with reading(chapter.name):
        return _article_of(chapter)


def _article_of(chapter: Chapter) -> str:
    findings = "".join(f"<li>{escape(text)}</li>" for text in chapter.findings)
    glance = f'<h3>At a glance</h3><ul class="findings">{findings}</ul>' if findings else ""
    parts = "\n".join(_figure(part) if isinstance(part, Chart) else _table(part) for part in chapter.parts)
    notes = "".join(f"<li>{escape(text)}</li>" for text in chapter.notes)
    return f"""<article id="{escape(chapter.name)}">
<h2>{escape(chapter.title)}</h2>
<p>{escape(chapter.about)}</p>
<p class="soft">{escape(caption_of(chapter))}<br><code>{escape(chapter.command)}</code></p>
{glance}
{parts}
{f"<details><summary>How it was measured, and what was not</summary><ul>{notes}</ul></details>" if notes else ""}
<details><summary>Environment</summary><dl>{_facts(chapter)}</dl></details>
</article>"""


def _facts(chapter: Chapter) -> str:
    facts: dict[str, Any] = {"date": chapter.date, "command": chapter.command, **chapter.environment}
    text = {key: value for key, value in facts.items() if value not in (None, {}, "")}
    return "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>" for key, value in text.items()
    )


def _figure(chart: Chart) -> str:
    picture = plots.svg(chart).replace("<svg ", f'<svg role="img" aria-label="{escape(chart.title)}" ', 1)
    return f"""<figure id="{escape(chart.slug)}"><figcaption><h3>{escape(chart.title)}</h3>
<p>{escape(chart.sentence)}</p></figcaption>
{picture}
</figure>"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f"""<section><h3>{escape(table.title)}: figures</h3><p>{escape(table.sentence)}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div></section>"""


def _cell(text: str) -> str:
    if text.startswith("*"):
        return f'<td class="best">{escape(text[1:])}</td>'
    return f'<td class="none">{escape(text)}</td>' if text in ("-", "cannot", "failed") else f"<td>{escape(text)}</td>"
