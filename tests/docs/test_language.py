"""The pages use the glossary of CONTRIBUTING.md and name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Written by commands: their words come from tables and from other libraries.
GENERATED = ("families.md", "support.md", "benchmarks.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED
]
#: Words that were replaced, and what by.
REPLACED = {
    r"any-length|plans? for any length": "dynamic plan",
    r"exact plans?": "static plan",
    r"short way": "fast path",
    r"long way": "full path",
    r"blind": "fully masked rows",
    r"sights?": "mask predicate",
    r"chapters?": "report sections",
    r"slots?": "cache positions",
    r"products?": "GEMMs",
    r"memos?": "cache",
}
#: Where a path of a page may begin.
PLACES = ("", "src/fastattn", "src/fastattn/backends", "src/fastattn/backends/triton", "src/fastattn/backends/cudnn")
PLACES += ("src/fastattn/integrations/transformers", "src/fastattn/parallel", "src/fastattn/dispatch")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = {
        match.group(): instead for word, instead in REPLACED.items() for match in re.finditer(rf"\b({word})\b", text)
    }
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    """What stands in backticks and looks like a file or a folder of the repository is one. NAME is filled in."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:\.\./)*\w[\w./-]*(?:\.py|/))`", text))
    missing = {
        name for name in named if "NAME" not in name and not any((ROOT / place / name).exists() for place in PLACES)
    }
    assert not missing
