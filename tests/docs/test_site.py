"""The documentation's site builds without a warning, and its page of benchmarks says what the result files say."""

import html
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {"benchmarks.md"}  #: `make docs` makes it; git does not have it


def pages_in_the_menu():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE))


def test_every_page_is_in_the_menu():
    assert pages_in_the_menu() == {path.name for path in (ROOT / "docs").glob("*.md")} | GENERATED


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """A copy of the documentation, with the page of benchmarks."""
    pytest.importorskip("matplotlib")
    from benchmarks import site

    folder = tmp_path_factory.mktemp("site") / "docs"
    shutil.copytree(ROOT / "docs", folder)
    assert site.main([str(folder)]) == 0
    return folder


@pytest.mark.skipif(find_spec("zensical") is None, reason="zensical is not installed: the site was not built")
def test_the_site_builds_without_a_warning(docs):
    shutil.copy(ROOT / "mkdocs.yml", docs.parent)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=docs.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = docs.parent / "out" / "site"
    for page in pages_in_the_menu():
        assert (site / page).with_suffix(".html").exists(), page
    built = (site / "benchmarks.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="[^"]+" src="([^"]+)"', built)
    assert len(pictures) > 40 and all((site / picture).is_file() for picture in pictures)
    ids = set(re.findall(r'id="?([^" >]+)', built))
    assert set(re.findall(r'<a href="#([^"]+)">', built)) <= ids, "the index of figures leads to each of them"


def test_the_page_of_benchmarks_is_made_from_the_result_files(docs):
    """Each table says machine, commit and command; no picture of a page before is left."""
    from benchmarks import site
    from benchmarks.report.reading import load

    text = (docs / "benchmarks.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        found = load(path)
        assert f"({path.stem})" in text or f"({path.parent.name}-{path.stem})" in text
        assert found["command"] in html.unescape(text) and found["environment"]["commit"][:10] in text
    captions = re.findall(r"<caption>(.+?)</caption>", text)
    assert len(captions) == text.count("<thead>") - 1  # but for the index of figures
    assert all(re.fullmatch(r"NVIDIA H\d00.*, commit [0-9a-f]{10}.*: <code>.+</code>", caption) for caption in captions)
    pictures = set(re.findall(r'src="benchmarks/(.+?)"', text))
    (docs / "benchmarks" / "old.svg").write_text("<svg ")
    site.main([str(docs)])
    assert pictures == {path.name for path in (docs / "benchmarks").iterdir()}
