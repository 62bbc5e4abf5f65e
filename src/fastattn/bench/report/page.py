"""The page and the pictures of `fastattn report`, for a reader who has never seen the code.

The page is one HTML file: pictures as SVG, no scripts, nothing fetched. The templates escape what a result file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...common.printable import printable
from .. import output
from . import plots
from .charts import Section
from .sections import ABOUT, drawn, sections_of

TEMPLATES = Path(__file__).with_name("templates")


def check_outputs(
    html: str | None, folder: str | None, more: Iterable[str | None] = (), inputs: Iterable[str] = ()
) -> None:
    """Before a long run: raises ValueError or ImportError when what is asked for could not be written after it.

    html: a page; folder: of pictures; more: other files that are written; inputs: what is read.
    """
    output.check([html, *more], [folder], inputs)
    if html or folder:
        for package in ("matplotlib", "jinja2"):
            try:
                import_module(package)
            except ImportError as error:
                raise ImportError(f"plots and pages need {package}: pip install 'fastattn[bench]'") from error


def write(found: Mapping[str, dict[str, Any]], html: str | None, folder: str | None) -> None:
    """Writes the page and the pictures that are asked for, of result files by name. Everything is drawn before anything
    is written. Raises ValueError for a file that is not like ours."""
    if not (html or folder):
        return
    sections = sections_of(found)
    text = page(sections) if html else ""
    pictures = drawn(sections, lambda chart, section: plots.png(chart, section.caption)) if folder else {}
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for slug, picture in pictures.items():
            output.write(Path(folder) / f"{slug}.png", picture, follow=False)
        print(printable(f"Wrote {len(pictures)} pictures to {folder}"))
    if html:
        output.write(html, text)
        print(printable(f"Wrote {html}"))


def page(sections: Sequence[Section]) -> str:
    """The whole document."""
    pictures = drawn(sections, lambda chart, _: plots.svg(chart))
    return render("page.html", sections=sections, about=ABOUT, pictures=pictures)


def render(template: str, folders: Sequence[Path] = (), **values: Any) -> str:
    """A template's text; what is filled in is escaped. folders: of templates beside ours."""
    jinja2 = import_module("jinja2")
    loader = jinja2.FileSystemLoader([*folders, TEMPLATES])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text: str = environment.get_template(template).render(values)
    return text
