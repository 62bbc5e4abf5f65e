"""The modules of fastattn form layers: a file imports from its own layer or a lower one, and never in a circle.

The tests mirror the modules.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from import_graph import Import, circles, layer_of, lazy_names, read, upward

import fastattn

ROOT = Path(fastattn.__file__).parent

#: Lowest first. A package's name covers what is in it.
LAYERS = (
    ("config", "common"),
    ("_compat",),
    ("call", "shape_cache", "validation", "masks", "reference", "debug"),
    ("backends",),
    ("dispatch",),
    ("api", "varlen", "counters"),
    ("cache",),
    ("integrations", "hf", "flash", "drop_in"),
    ("parallel",),
    ("lm",),
    ("warming",),
    ("bench",),
    ("cli", "__main__"),
)
#: `fastattn/__init__.py` itself: a version and a table of names, which imports nothing until a name is looked up.
#: Who looks one up through it is counted as an importer of the module that defines the name.
LAYER = {"fastattn": 0} | {f"fastattn.{name}": n for n, names in enumerate(LAYERS, 1) for name in names}


@pytest.fixture(scope="module")
def graph() -> dict[str, list[Import]]:
    return read(ROOT)


def test_no_circles(graph: dict[str, list[Import]]) -> None:
    assert circles(graph) == []


def test_nothing_imports_a_higher_layer(graph: dict[str, list[Import]]) -> None:
    assert upward(graph, LAYER) == []


def test_every_module_has_a_layer(graph: dict[str, list[Import]]) -> None:
    homeless = [name for name in graph if name != "fastattn" and layer_of(name, LAYER) in (None, 0)]
    assert homeless == []


def test_every_layer_has_modules(graph: dict[str, list[Import]]) -> None:
    assert [name for name in LAYER if name not in graph] == []


def test_lazy_names_are_annotated() -> None:
    """The graph reads the lazy names of fastattn from its imports for type checkers: the table says the same."""
    table = {name: f"fastattn.{home}" for name, home in fastattn._HOMES.items()}
    assert lazy_names(ROOT) == table
    assert set(table) == set(fastattn.__all__)


#: Directories and files of tests that no module stands for.
ACROSS = {"helpers", "benchmarks", "differential", "docs", "families", "faults", "gpu", "gpuless", "mutations"}
ACROSS_FILES = {"test_examples.py", "test_import.py", "test_layers.py", "test_wheel.py"}
TESTS = Path(__file__).parent


def test_tests_mirror_the_modules(graph: dict[str, list[Import]]) -> None:
    """Each directory of tests is that of a package, each file of tests beside them that of a module."""
    files = {path.relative_to(TESTS) for path in TESTS.rglob("*.py") if path.name != "conftest.py"}
    folders = {path.parent for path in files if path.parts[0] not in ACROSS} - {Path()}
    assert [str(folder) for folder in folders if f"fastattn.{'.'.join(folder.parts)}" not in graph] == []
    beside = {str(path) for path in files if len(path.parts) == 1} - ACROSS_FILES
    assert [name for name in beside if f"fastattn.{name[5:-3]}" not in graph] == []
    assert [name for name in ACROSS | ACROSS_FILES if not (TESTS / name).exists()] == []


def test_make_runs_tests_that_exist() -> None:
    """Also those that `make quick` and the like name one by one."""
    for file in (TESTS.parent / name for name in ("Makefile", "pyproject.toml", ".ci/run")):
        text = file.read_text(encoding="utf-8") if file.exists() else ""  # a copy may come without
        paths = {path.rstrip(".") for path in re.findall(r"\btests/[\w./-]+", text)}
        assert [path for path in sorted(paths) if not (TESTS.parent / path).exists()] == []


# The checker itself, on packages that are made up.


def tree(root: Path, files: dict[str, str]) -> dict[str, list[Import]]:
    """The graph of the package `p` with these files; a directory's `__init__.py` is empty if it is not given."""
    for name, text in files.items():
        path = root / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in {path.parent for path in root.rglob("*.py")} | {root / "p"}:
        (folder / "__init__.py").touch()
    return read(root / "p")


def edges(graph: dict[str, list[Import]]) -> set[tuple[str, str]]:
    return {(edge.importer, edge.imported) for found in graph.values() for edge in found}


@pytest.mark.parametrize(
    "text, imported",
    [
        ("from .low.b import f", "p.low.b"),
        ("from .low import b", "p.low.b"),
        ("from .low import b as other", "p.low.b"),
        ("from .low import f", "p.low"),
        ("from . import c", "p.c"),
        ("from .c import *", "p.c"),
        ("from p.low.b import f", "p.low.b"),
        ("from p import c", "p.c"),
        ("import p.low.b", "p.low.b"),
        ("import p.low.b as b, sys", "p.low.b"),
        ("def f():\n    from .c import g", "p.c"),
        ("class C:\n    def f(self):\n        import p.c", "p.c"),
        ("try:\n    from .c import g\nexcept ImportError:\n    pass", "p.c"),
        ("if TYPE_CHECKING:\n    from .c import G", "p.c"),
        ("import_module('.c', __package__)", "p.c"),
        ("importlib.import_module('p.low.b')", "p.low.b"),
        ("import_module('.b', 'p.low')", "p.low.b"),
        ("import_module(f'{__package__}.c')", "p.c"),
        ("__import__('p.c')", "p.c"),
    ],
)
def test_an_import_is_found(tmp_path: Path, text: str, imported: str) -> None:
    assert edges(tree(tmp_path, {"a.py": text, "c.py": "", "low/b.py": ""})) == {("p.a", imported)}


def test_relative_imports_start_at_the_package(tmp_path: Path) -> None:
    files = {"a.py": "", "low/__init__.py": "from .b import f\nfrom .. import a", "low/b.py": "from ..a import f"}
    assert edges(tree(tmp_path, files)) == {("p.low", "p.low.b"), ("p.low", "p.a"), ("p.low.b", "p.a")}


def test_computed_names_stand_for_what_they_can_name(tmp_path: Path) -> None:
    """All that match the pattern; if some of them are spelled out in the file, those."""
    others = {"x_one.py": "", "x_two.py": "", "y.py": ""}
    every = {"a.py": "import_module(f'.x_{name}', __package__)", **others}
    assert edges(tree(tmp_path / "1", every)) == {("p.a", "p.x_one"), ("p.a", "p.x_two")}
    some = {"a.py": "NAMES = ('y', 'x_two')\nimport_module(f'{__package__}.{name}')", **others}
    assert edges(tree(tmp_path / "2", some)) == {("p.a", "p.y"), ("p.a", "p.x_two")}


def test_lazy_names_count_where_they_are_looked_up(tmp_path: Path) -> None:
    lazy = "if TYPE_CHECKING:\n    from .b import f\n\ndef __getattr__(name):\n    return import_module(f'.{HOME}')\n"
    files = {"__init__.py": lazy, "b.py": "", "c.py": ""}
    assert edges(tree(tmp_path / "1", {**files, "a.py": "from . import f"})) == {("p.a", "p.b")}
    assert edges(tree(tmp_path / "2", {**files, "a.py": "import p"})) == {("p.a", "p.b")}
    assert edges(tree(tmp_path / "3", {**files, "a.py": "from . import __version__"})) == {("p.a", "p")}


def test_other_libraries_are_left_out(tmp_path: Path) -> None:
    text = "import os, c\nfrom c import d\nfrom torch import nn\nimport_module('c')\nimport_module(name)"
    assert edges(tree(tmp_path, {"a.py": text, "c.py": ""})) == set()


def test_a_circle_is_found(tmp_path: Path) -> None:
    """Also one of three files whose last import is in a function; what only leads into it is not part of it."""
    files = {
        "a.py": "from . import b",
        "b.py": "from .c import f",
        "c.py": "def f():\n    from .a import g",
        "into.py": "from . import a",
        "out.py": "",
    }
    assert circles(tree(tmp_path, files)) == [("p.a", "p.b", "p.c")]


def test_two_circles_are_told_apart(tmp_path: Path) -> None:
    files = {"a.py": "from . import b", "b.py": "from . import a, c", "c.py": "from . import d", "d.py": "import p.c"}
    assert circles(tree(tmp_path, files)) == [("p.a", "p.b"), ("p.c", "p.d")]


def test_no_circle_is_found_in_a_diamond(tmp_path: Path) -> None:
    files = {"a.py": "from . import b, c", "b.py": "from . import d", "c.py": "from . import d", "d.py": ""}
    assert circles(tree(tmp_path, files)) == []


@pytest.mark.parametrize("text", ["from .high import b", "def f():\n    from .high.b import g"])
def test_an_upward_import_is_found(tmp_path: Path, text: str) -> None:
    graph = tree(tmp_path, {"low.py": text, "high/b.py": "from .. import low\nfrom . import c", "high/c.py": ""})
    found = upward(graph, {"p": 0, "p.low": 1, "p.high": 2})
    assert [(edge.importer, edge.imported) for edge in found] == [("p.low", "p.high.b")]


def test_the_closest_layer_counts() -> None:
    layers = {"p.a": 1, "p.a.b": 2}
    assert [layer_of(name, layers) for name in ["p.a", "p.a.c", "p.a.b", "p.a.b.d", "p.ab", "p"]] == [
        1,
        1,
        2,
        2,
        None,
        None,
    ]
