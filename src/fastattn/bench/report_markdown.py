"""The same report as markdown, for the documentation: pictures as SVG files in a folder beside the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import plots
from .chapters import Chapter
from .charts import Chart, Table
from .report_html import ABOUT, caption_of

AGAIN = """Result files are in `benchmarks/results/`, each with its environment and command. To measure here, and to
make a page of what is there (which needs no GPU):

```console
$ fastattn sweep --json sweep.json --html sweep.html --plots plots
$ fastattn report benchmarks/results/h100/*.json --html report.html
```"""
HEAD = "<!-- Made by `fastattn report --markdown` from result files: change those, not this. -->"


def write_markdown(path: str | Path, chapters: Sequence[Chapter]) -> None:
    """Writes the page, and its pictures to a folder of its name; pictures of an earlier page there are removed."""
    path = Path(path)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for chapter in chapters:
        for part in chapter.parts:
            if isinstance(part, Chart):
                (folder / f"{part.slug}.svg").write_text(plots.svg(part) + "\n", encoding="utf-8")
    path.write_text(page(chapters, folder.name), encoding="utf-8")


def page(chapters: Sequence[Chapter], folder: str) -> str:
    """The page's text; folder: where its pictures are, from the page."""
    parts = [HEAD, "# Benchmarks", ABOUT, AGAIN]
    for chapter in chapters:
        parts += [f"## {chapter.title} ({chapter.name})", chapter.about, f"{caption_of(chapter)}: `{chapter.command}`"]
        if chapter.findings:
            parts.append("\n".join(f"- {text}" for text in chapter.findings))
        for part in chapter.parts:
            parts += _chart(part, folder) if isinstance(part, Chart) else _table(part)
        if chapter.notes:
            parts += ["### How it was measured, and what was not", "\n".join(f"- {_plain(n)}" for n in chapter.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _chart(chart: Chart, folder: str) -> list[str]:
    return [f"### {chart.title}", chart.sentence, f"![{chart.title}]({folder}/{chart.slug}.svg)"]


def _table(table: Table) -> list[str]:
    lines = [table.head, ["---", *(["---:"] * (len(table.head) - 1))], *(list(map(_cell, row)) for row in table.rows)]
    return [f"### {table.title}: figures", table.sentence, "\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _cell(text: str) -> str:
    return f"**{text[1:]}**" if text.startswith("*") else text.replace("|", "\\|")


def _plain(text: str) -> str:
    """Text in which markdown would see emphasis or a tag where none is meant."""
    for character in "*_<":
        text = text.replace(character, f"\\{character}")
    return text
