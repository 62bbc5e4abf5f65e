"""Which Triton is installed, found without importing it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn._compat import triton_compiler
from fastattn._compat.triton_compiler import compiler


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    compiler.cache_clear()
    yield
    compiler.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like Triton's."""
    for folder in ("_C", "backends/nvidia/bin"):
        (tmp_path / "triton" / folder).mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text('"""x"""\n__version__ = "3.8.1"\nraise SystemExit\n')
    for name in ("_C/libtriton.so", "backends/nvidia/bin/ptxas", "backends/nvidia/bin/ptxas-blackwell"):
        (tmp_path / "triton" / name).write_text(name)
    place = str(tmp_path / "triton" / "__init__.py")
    spec = importlib.util.spec_from_file_location("triton", place)
    monkeypatch.setattr(triton_compiler, "find_spec", lambda name: spec)
    return tmp_path / "triton"


def test_the_one_that_is_installed() -> None:
    triton = pytest.importorskip("triton")
    found = compiler()
    assert found is not None
    assert (found.version, found.place) == (triton.__version__, str(Path(triton.__file__).parent))
    assert not found.untested


def test_it_is_not_imported(package: Path) -> None:
    found = compiler()
    assert found is not None and found.version == "3.8.1" and found.place == str(package)


@pytest.mark.parametrize("name", ["_C/libtriton.so", "backends/nvidia/bin/ptxas", "__init__.py"])
def test_another_compiler_is_another_identity(package: Path, name: str) -> None:
    before = compiler()
    path = package / name
    path.write_text(path.read_text().replace("3.8.1", "3.8.2") + " ")
    compiler.cache_clear()
    after = compiler()
    assert before is not None and after is not None and before.identity != after.identity


def test_another_assembler_by_a_variable(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler()
    (tmp_path / "my_ptxas").write_text("x")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "my_ptxas"))
    compiler.cache_clear()
    after = compiler()
    assert before is not None and after is not None and before.identity != after.identity
    os.utime(tmp_path / "my_ptxas", (1, 1))
    compiler.cache_clear()
    last = compiler()
    assert last is not None and last.identity != after.identity


def test_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_compiler, "find_spec", lambda name: None)
    assert compiler() is None
    compiler.cache_clear()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compiler() is None
