"""`attention.cpp` as a module: compiled once for each torch and Python, in a process of its own while calls go on, and
kept on disk under the rules of `common/folder.py`."""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from ...common.disk import Files
from ...common.forks import after_fork

NAME = "fastattn_native"
FILES = Files("module", 16 << 20)
SOURCE = Path(__file__).with_name("attention.cpp")
TIMEOUT = 600.0  #: seconds; it takes 20
_NICENESS = 10  #: what runs in the foreground goes first
_OPTIONS = "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w"
_LIBRARIES = "torch_python", "torch_cpu", "c10"

_loads = itertools.count()
_log = logging.getLogger("fastattn")


class NoLibrary(Exception):
    """There is no module on this machine, and why."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, or one of the usual names."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    found = next((found for name in names if name and (found := shutil.which(name))), None)
    return None if found is None else os.path.abspath(found)  # it does not run in the current directory


def label() -> bytes:
    """Everything that the module depends on."""
    parts = [torch.__version__, str(torch.version.git_version), str(sysconfig.get_config_var("SOABI"))]
    parts += [platform.machine(), *_OPTIONS]
    parts += [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    return "\n".join(parts).encode()


def found() -> Any:
    """The module from the disk; None where it is not there, or cannot be loaded."""
    data = FILES.load(label())
    if data is None:
        return None
    try:
        return _loaded(data)
    except (ImportError, OSError) as error:
        _log.debug("native module from disk discarded: %s", error)
        FILES.discard(label())
        return None


def hindrance() -> str:
    """Why it cannot be compiled here, "" where it can."""
    if sys.platform != "linux" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it is for Linux, and a Python with the interpreter's lock"
    if compiler() is None:
        return "there is no C++ compiler (c++, g++, clang++, $CXX)"
    missing = [path for path in _headers() if not path.is_dir()]
    return f"there is no {missing[0]}" if missing else ""


def _headers() -> tuple[Path, ...]:
    torchs = Path(torch.__file__).parent / "include"
    return torchs, torchs / "torch/csrc/api/include", Path(sysconfig.get_paths()["include"])


def made() -> Any:
    """The module, compiled now if it is not on disk. Raises NoLibrary."""
    text = label()
    with FILES.claimed(text, timeout=TIMEOUT):
        module = found()  # another process may have made it
        if module is not None:
            return module
        data = _compiled()
        try:
            module = _loaded(data)
        except (ImportError, OSError) as error:
            raise NoLibrary(f"it cannot be loaded: {error}") from error
        FILES.store(text, data)
    return module


def _compiled() -> bytes:
    program, why = compiler(), hindrance()
    if program is None or why:
        raise NoLibrary(why)
    with tempfile.TemporaryDirectory(prefix="fastattn-") as folder:
        out = Path(folder) / "module.so"
        command = [program, *_OPTIONS, str(SOURCE), "-o", str(out), f"-L{Path(torch.__file__).parent / 'lib'}"]
        command += [part for path in _headers() for part in ("-isystem", str(path))]
        command += [f"-l{name}" for name in _LIBRARIES]
        said = _run(command, folder)
        try:
            return out.read_bytes()
        except OSError:
            lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or ["it said nothing"]
            raise NoLibrary(f"{program} does not compile it: {lines[0].strip()}") from None


_running: set[subprocess.Popen[str]] = set()
after_fork(sys.modules[__name__], lambda _: _running.clear())


def _run(command: list[str], folder: str) -> str:
    """What a command says. Raises NoLibrary where it cannot be started, or takes too long."""
    nice = shutil.which("nice")
    if nice is not None:
        command = [nice, "-n", str(_NICENESS), *command]
    environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is not meant for it
        )
    except OSError as error:
        raise NoLibrary(f"{command[0]} cannot be started: {error}") from error
    _running.add(process)
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired as error:
        _kill(process)
        if process.stdout is not None:
            process.stdout.close()
        raise NoLibrary(f"{command[0]} took more than {TIMEOUT:.0f} s") from error
    finally:
        _running.discard(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, 9)
    process.wait()


@atexit.register
def _kill_all() -> None:
    for process in list(_running):
        _kill(process)


def _loaded(data: bytes) -> Any:
    """The module whose file this is: loaded from memory, so that what was checked is what is run."""
    handle = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            file.write(data)
        path = f"/proc/self/fd/{'./' * next(_loads)}{handle}"  # Python knows a module that it has loaded by its path
        loader = ExtensionFileLoader(NAME, path)
        spec = importlib.util.spec_from_loader(NAME, loader, origin=path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    finally:
        os.close(handle)


class Builder:
    """Makes the module once, by a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.why = ""  #: there is none
        self._lock = threading.Lock()

    @property
    def begun(self) -> bool:
        """Whether it was started."""
        return self._thread is not None

    def start(self, done: Callable[[Any], None]) -> None:
        """`done(module)` once it is there. Only the first call starts anything."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._make, args=(done,), name="fastattn-native", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the system has no more threads
                    self.why = str(error)

    def wait(self, timeout: float) -> bool:
        """Waits until it is there or will not be, if it was started. False if that takes longer."""
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def _make(self, done: Callable[[Any], None]) -> None:
        try:
            done(made())
        except NoLibrary as error:
            self.why = str(error)
        except Exception as error:
            self.why = f"{type(error).__name__}: {error}"
        if self.why:
            _log.debug("no native module: %s", self.why)
