"""The documentation's site builds without a warning, and its page of benchmarks is what the result files say."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


def pages_in_the_menu():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE))


def test_every_page_is_in_the_menu():
    assert pages_in_the_menu() == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.skipif(find_spec("zensical") is None, reason="zensical is not installed: the site was not built")
def test_the_site_builds_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in pages_in_the_menu():
        assert (tmp_path / "out" / "site" / page).with_suffix(".html").exists(), page


def test_the_page_of_benchmarks_is_made_from_the_result_files():
    """`make docs` renews it; nobody writes it by hand."""
    from fastattn.bench.chapters import chapters_of
    from fastattn.bench.reading import load
    from fastattn.bench.report_markdown import page

    chapters = chapters_of({str(path): load(path) for path in RESULTS})
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page(chapters, "benchmarks")
    pictures = set(re.findall(r"\]\(benchmarks/(.+?)\)", page(chapters, "benchmarks")))
    assert pictures == {path.name for path in (ROOT / "docs" / "benchmarks").iterdir()}
