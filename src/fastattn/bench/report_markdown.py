"""The same report as markdown, for the documentation: pictures as SVG files in a folder beside the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from . import output, plots
from .chapters import ABOUT, Chapter, caption_of, drawn
from .charts import Chart, Table

AGAIN = """Result files are in `benchmarks/results/`, each with its environment and command. To measure here, and to
make a page of what is there (which needs no GPU):

```console
$ fastattn sweep --json sweep.json --html sweep.html --plots plots
$ fastattn report benchmarks/results/h100/*.json --html report.html
```"""
HEAD = "<!-- Made by `fastattn report --markdown` from result files: change those, not this. -->"


#: What has a meaning to markdown within a line, or to one of its extensions ({: attributes }).
_MARKS = re.compile(r"[\\`*_{}\[\]|]")
_PICTURE = re.compile(r"\]\(([^()]+)/([A-Za-z0-9._-]+\.svg)\)")


def folder_of(path: str | Path) -> Path:
    """Where the pictures of a page are."""
    return Path(path).with_suffix("")


def write_markdown(path: str | Path, chapters: Sequence[Chapter]) -> None:
    """Writes the page, and its pictures to a folder of its name; those of the page that was there before are removed,
    nothing else is. Raises OSError when something cannot be written."""
    path, folder = Path(path), folder_of(path)
    pictures = {f"{slug}.svg": text for slug, text in drawn(chapters, lambda chart, _: plots.svg(chart)).items()}
    text, before = page(chapters, folder.name), _pictures_of(path, folder)
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        output.write(folder / name, picture + "\n", follow=False)
    output.write(path, text)
    for old in before:
        if old.name not in pictures:
            old.unlink(missing_ok=True)


def _pictures_of(path: Path, folder: Path) -> list[Path]:
    """The pictures of a page that was made here: it says so, it shows them, and they begin as ours do."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text.startswith(HEAD):
            return []
        names = {name for where, name in _PICTURE.findall(text) if where == folder.name}
        return [folder / name for name in sorted(names) if _is_ours(folder / name)]
    except (OSError, ValueError):
        return []


def _is_ours(picture: Path) -> bool:
    if picture.is_symlink() or not picture.is_file():
        return False
    with picture.open("rb") as file:
        return file.read(5) == b"<svg "


def page(chapters: Sequence[Chapter], folder: str) -> str:
    """The page's text; folder: where its pictures are, from the page."""
    parts = [HEAD, "# Benchmarks", ABOUT, AGAIN]
    for chapter in chapters:
        parts += [f"## {_plain(f'{chapter.title} ({chapter.name})')}", _plain(chapter.about)]
        parts.append(f"{_plain(caption_of(chapter))}: {_code(chapter.command)}")
        if chapter.findings:
            parts.append("\n".join(f"- {_plain(text)}" for text in chapter.findings))
        for part in chapter.parts:
            parts += _chart(part, folder) if isinstance(part, Chart) else _table(part)
        if chapter.notes:
            parts += ["### How it was measured, and what was not", "\n".join(f"- {_plain(n)}" for n in chapter.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _chart(chart: Chart, folder: str) -> list[str]:
    title = _plain(chart.title)
    return [f"### {title}", _plain(chart.sentence), f"![{title}]({quote(folder)}/{chart.slug}.svg)"]


def _table(table: Table) -> list[str]:
    lines = [list(map(_plain, table.head)), ["---", *(["---:"] * (len(table.head) - 1))]]
    lines += [list(map(_cell, row)) for row in table.rows]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return [f"### {_plain(table.title)}: figures", _plain(table.sentence), rows]


def _cell(text: str) -> str:
    return f"**{_plain(text[1:])}**" if text.startswith("*") else _plain(text)


def _plain(text: str) -> str:
    """Text in which markdown would see emphasis, a link, an attribute or a tag where none is meant."""
    return _MARKS.sub(r"\\\g<0>", escape(text, quote=False))


def _code(text: str) -> str:
    """Text as code, whatever backticks it has."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"
