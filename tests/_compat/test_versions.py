"""The versions that are promised, pinned and tested are the same in each file that names them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastattn._compat import versions
from fastattn._compat.versions import Gone, gone, need, newer_than_tested, numbers

ROOT = Path(__file__).parents[2]
REQUIREMENT = re.compile(r"^([\w-]+)(?:\[[\w,]+\])?\s*(?:>=([\d.]+))?")


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def promised(*left_out: str) -> dict[str, str]:
    """The lower bound of every requirement in pyproject.toml, extras included; "" where there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(x for name, part in extras.items() if name not in left_out for x in part)]
    found = [REQUIREMENT.match(line) for line in lines]
    assert all(found)
    return {m[1]: m[2] or "" for m in found if m and m[1] != "fastattn"}


def test_every_requirement_is_pinned_and_has_a_lower_bound() -> None:
    assert promised().keys() <= pins("constraints.txt").keys()
    assert [name for name, bound in promised().items() if not bound] == []


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    bounds = promised("docs", "dev", "recipes")
    for name in bounds.keys() - {"torch"}:  # see there why
        found, bound = numbers(oldest[name]), numbers(bounds[name])
        assert found[: len(bound)] == bound and not any(found[len(bound) :]), name
    assert oldest["torch"] == pins("constraints.txt")["torch"] == pins("constraints-newest.txt")["torch"]


def test_the_table_says_the_same() -> None:
    pinned, bounds = pins("constraints.txt"), promised()
    for name, (oldest, newest) in versions.TESTED.items():
        assert oldest == bounds[name], name
        assert numbers(pinned[name]) >= numbers(oldest)
        if name != "nvidia-cudnn-frontend":  # pinned to an older one: see there why
            assert numbers(pinned[name])[: len(numbers(newest))] == numbers(newest), name


def test_no_registry_is_named() -> None:
    for file in ROOT.glob("constraints*.txt"):
        assert not re.search(r"https?:|index-url|file:", file.read_text()), file


@pytest.mark.parametrize(
    "name, installed, newest",
    [
        ("transformers", "5.24.9", ""),
        ("transformers", "5.25.0", "5.24"),
        ("transformers", "5.4", ""),
        ("torch", "2.13.0+cu130", ""),
        ("torch", "3.0.0a1", "2.13"),
        ("something", "9", ""),
        ("torch", "", ""),
    ],
)
def test_newer_than_tested(name: str, installed: str, newest: str) -> None:
    assert newer_than_tested(name, installed) == newest


def test_gone_says_what_and_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str) -> Any:
        return "9.9"

    monkeypatch.setattr(versions, "version", of)
    assert gone("transformers", "transformers.thing") == (
        "transformers 9.9 has no transformers.thing: fastattn was tested with 5.4 to 5.24: "
        "pip install 'transformers>=5.4,<5.25'"
    )
    monkeypatch.setattr(versions, "version", lambda name: "5.4.0")
    assert gone("transformers", "x") == "transformers 5.4.0 has no x; 5.24 has: pip install -U 'transformers<5.25'"
    monkeypatch.setattr(versions, "version", lambda name: "0.1")
    assert gone("liger-kernel", "x").endswith("pip install 'liger-kernel>=0.8.5,<0.8.6'")


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(Gone, match=r"^nothing is not installed: fastattn needs it for nothing\.at\.all$"):
        need("nothing", "nothing.at.all")


def test_compilers_are_listed_one_by_one() -> None:
    """From the oldest version that is promised to the newest one tested."""
    assert (versions.COMPILERS[0], versions.COMPILERS[-1]) == versions.TESTED["triton"]
    for installed in (*versions.COMPILERS, f"{versions.COMPILERS[-1]}.2", f"{versions.COMPILERS[0]}.0+git123"):
        assert not versions.untested_compiler(installed), installed
    major, minor = numbers(versions.COMPILERS[-1])
    for installed in (f"{major}.{minor + 1}.0", f"{major + 1}.0", "3.5.9", "3.60", "of an unknown version", ""):
        assert "was not tested" in versions.untested_compiler(installed), installed
