"""What a wheel holds: the package as it is in src/, and nothing beside it. `make wheel-test` installs and runs one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fastattn"

pytestmark = pytest.mark.slow


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what git would take, so that nothing is written beside the sources."""
    backend, copy, out = (tmp_path_factory.mktemp(name) for name in ("backend", "copy", "out"))
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    done = pip("install", "-q", "--target", str(backend), *build["requires"])
    if done.returncode:
        pytest.skip(f"{build['requires']} could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    for name in ("src", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = pip(
        "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy), PYTHONPATH=str(backend)
    )  # without isolation: a failure here is a fault of the project, not of the registry
    assert done.returncode == 0, done.stderr
    [path] = out.iterdir()
    assert path.name == f"fastattn-{fastattn.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_bytes(wheel.read(f"fastattn-{fastattn.__version__}.dist-info/METADATA"))


def test_it_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """No tests, no tools of maintainers; every module, `py.typed` and data files."""
    about = f"fastattn-{fastattn.__version__}.dist-info/"
    files = {name for name in wheel.namelist() if not name.startswith(about)}
    expected = {
        f"fastattn/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == expected
    assert "fastattn/py.typed" in files and f"{about}licenses/LICENSE" in wheel.namelist()


def test_every_directory_is_a_package(wheel: zipfile.ZipFile) -> None:
    """A directory without an `__init__.py` would work here and be overlooked by tools that look for packages."""
    folders = {name.rpartition("/")[0] for name in wheel.namelist() if name.endswith(".py")}
    assert [folder for folder in folders if f"{folder}/__init__.py" not in wheel.namelist()] == []


def test_it_names_the_command_and_the_extras(wheel: zipfile.ZipFile, metadata: Message) -> None:
    entries = wheel.read(f"fastattn-{fastattn.__version__}.dist-info/entry_points.txt").decode()
    assert entries.split() == ["[console_scripts]", "fastattn", "=", "fastattn.cli.main:main"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Version"] == project["version"] == fastattn.__version__
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == project["dependencies"]
