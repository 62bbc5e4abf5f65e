"""The native module is compiled once, kept on disk, trusted as plans are, and missed by nobody."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from native_driver import compiled

from fastattn.cli import own_probes
from fastattn.dispatch.native import calls, library
from fastattn.dispatch.native.library import Builder, NoLibrary

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not all(path.is_dir() for path in library._headers()),
    reason="the module is for Linux, and needs the headers of torch and of Python",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("FASTATTN_NATIVE", raising=False)
    monkeypatch.delenv("FASTATTN_COMPILE", raising=False)
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def binary() -> bytes:
    """What the compiler gives for a module that does nothing."""
    if library.compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        source = Path(os.environ.get("TMPDIR", "/tmp")) / f"nothing-{os.getpid()}.cpp"
        source.write_text(
            "#include <Python.h>\n"
            'static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fastattn_native", nullptr, -1, nullptr};\n'
            "PyMODINIT_FUNC PyInit_fastattn_native() { return PyModule_Create(&definition); }\n"
        )
        patch.setattr(library, "SOURCE", source)
        try:
            return library._compiled()
        finally:
            source.unlink()


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> bytes:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(library, "_compiled", nobody)


def a_compiler(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands for the compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def test_the_module_has_what_is_called() -> None:
    module = compiled()
    names = ("attention", "program", "remember", "remember_backward", "backwards", "clear", "size", "served", "setup")
    assert all(callable(getattr(module, name)) for name in names)


def test_it_is_compiled_once(binary: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_compiled", lambda: binary)
    assert library.found() is None
    assert library.made().__name__ == "fastattn_native"
    (file,) = folder.glob("*.module")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    forbid(monkeypatch)
    assert library.made().__name__ == library.found().__name__ == "fastattn_native"


@pytest.mark.parametrize("damage", ["a byte", "cut short", "another's"])
def test_what_was_not_written_here_is_not_loaded(
    damage: str, binary: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_compiled", lambda: binary)
    library.made()
    (file,) = folder.glob("*.module")
    data = bytearray(file.read_bytes())
    if damage == "a byte":
        data[-100] ^= 1
    file.write_bytes(data[:-1] if damage == "cut short" else data)
    if damage == "another's":
        file.chmod(0o666)
    assert library.found() is None
    library.made()
    assert library.found() is not None


def test_what_cannot_be_loaded_is_removed(binary: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.FILES.store(library.label(), b"no library")
    assert library.found() is None
    assert list(folder.glob("*.module")) == []
    monkeypatch.setattr(library, "_compiled", lambda: b"no library")
    with pytest.raises(NoLibrary, match="cannot be loaded"):
        library.made()
    assert list(folder.glob("*.module")) == []


def test_everything_that_it_depends_on_is_in_its_label(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {library.label()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        seen.add(library.label())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_OPTIONS", ("-O0",))
        seen.add(library.label())
    with pytest.MonkeyPatch.context() as patch:
        other = tmp_path / "attention.cpp"
        other.write_text(library.SOURCE.read_text() + "\n")
        patch.setattr(library, "SOURCE", other)
        seen.add(library.label())
        (tmp_path / "program.h").write_text("// what it includes")
        seen.add(library.label())
    assert len(seen) == 5


def test_nothing_hinders_where_there_is_a_compiler() -> None:
    """Else all tests of the native module would be skipped."""
    if shutil.which("g++") and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        assert library.hindrance() == ""


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in library.hindrance()
    with pytest.raises(NoLibrary, match="no C\\+\\+ compiler"):
        library.made()
    (finding,) = own_probes.native()
    assert finding.state == ("missing" if torch.cuda.is_available() else "none") and "C++ compiler" in finding.text


def test_no_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "none")})
    if library.compiler() is not None:
        assert library.hindrance() == f"there is no {tmp_path / 'none'}"


def test_what_the_compiler_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_compiler(tmp_path / "cxx", "echo warning; echo 'x.cpp: error: no such thing'; exit 1", monkeypatch)
    with pytest.raises(NoLibrary, match="error: no such thing"):
        library.made()
    a_compiler(tmp_path / "cxx", "exit 1", monkeypatch)
    with pytest.raises(NoLibrary, match="it said nothing"):
        library.made()


def test_a_compiler_that_does_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_compiler(tmp_path / "cxx", f"echo $$ > {tmp_path / 'pid'}; sleep 1000 & wait", monkeypatch)
    monkeypatch.setattr(library, "TIMEOUT", 1.0)
    with pytest.raises(NoLibrary, match="more than 1 s"):
        library.made()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_compiler_does_not_run_in_the_users_folder(
    binary: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_compiler(tmp_path / "cxx", f"pwd > {tmp_path / 'where'}; exit 1", monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoLibrary):
        library.made()
    assert (tmp_path / "where").read_text().strip() != str(tmp_path)


def test_a_process_that_ends_ends_its_compiler(tmp_path: Path) -> None:
    a = tmp_path / "cxx"
    a.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nsleep 1000 &\nwait\n")
    a.chmod(0o755)
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from fastattn.dispatch.native import library\n"
        "builder = library.Builder()\n"
        "builder.start(print)\n"
        f"while not Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.05)\n"
        "time.sleep(0.2)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "CXX": str(a)}, check=True, timeout=100)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the compiler goes on")


def test_a_builder_makes_it_once_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made, gate, started = [], threading.Event(), []

    def slow() -> Any:
        started.append(1)
        gate.wait(10)
        return "the module"

    monkeypatch.setattr(library, "made", slow)
    builder = Builder()
    builder.start(made.append)
    builder.start(made.append)
    assert not builder.wait(0.05) and made == []
    gate.set()
    assert builder.wait(10) and (made, started, builder.why) == (["the module"], [1], "")


@pytest.mark.parametrize("error", [NoLibrary("no compiler"), OSError("no space"), MemoryError()])
def test_a_builder_says_why_not(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Any:
        raise error

    monkeypatch.setattr(library, "made", made)
    builder = Builder()
    builder.start(lambda module: None)
    assert builder.wait(10) and builder.why
    monkeypatch.setattr(calls, "builder", builder)
    monkeypatch.setattr(calls, "module", None)
    assert calls.state() == ("none", f"each call goes through Python: {builder.why}")
    (finding,) = own_probes.native()
    assert builder.why in finding.text


@pytest.mark.parametrize(
    "name, value, starts",
    [("FASTATTN_NATIVE", "0", False), ("FASTATTN_COMPILE", "off", False), ("FASTATTN_NATIVE", "1", True)],
)
def test_switches(name: str, value: str, starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(library.Builder, "start", lambda self, done: started.append(done))
    monkeypatch.setenv(name, value)
    calls.start()
    assert bool(started) == starts
