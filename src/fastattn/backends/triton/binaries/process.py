"""One process that compiles: it is started, spoken to and ended here; what it runs is `child.py`."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import IO, Any

from ...._compat.triton_compiler import compiler, environment
from .flag_set import Binary, FlagSet

PATIENCE = 3.0  #: seconds in which a process that is no longer needed may tidy up and end by itself
TIMEOUT = 600.0  #: seconds for one binary, which takes 2 to 10 on an idle machine

_ROOT = Path(__file__).parents[3]


class CompileError(Exception):
    """The compiler says no; it would again."""


class NoCompiler(Exception):
    """The compiler's process did not start, or ended before it had answered. Another one may do better."""


def command() -> list[str]:
    """Starts `child.py`. Raises NoCompiler where this program is not Python itself."""
    executable = get_executable()  # what an embedding program has named
    if not executable or getattr(sys, "frozen", False):
        raise NoCompiler("this program has no Python to start")
    options = ["-I", *(["-B"] if sys.dont_write_bytecode else [])]
    return [os.fsdecode(executable), *options, str(Path(__file__).with_name("child.py"))]


class Child:
    """One process. It is started with the first flag set; after an error the next one starts another."""

    def __init__(self, start: Callable[[], Sequence[str]] = command, timeout: float = TIMEOUT) -> None:
        self._start, self._timeout = start, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None  #: its stderr
        self._stopped = False

    def compile(self, flags: FlagSet) -> Binary:
        """Raises CompileError, or NoCompiler."""
        try:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._open()
            self._write(pickle.dumps(flags))
            answer = self._read()
        except (OSError, ValueError, EOFError) as error:  # (ValueError: the pipe was closed)
            raise NoCompiler(self._why(error)) from error
        if answer[:1] != b"+":
            text = answer[1:].decode(errors="replace")
            self.end()  # whatever state it is in
            raise (NoCompiler if text.startswith("out of memory") else CompileError)(text)
        try:
            return Binary.unpacked(answer[1:])
        except ValueError as error:
            raise NoCompiler(self._why(error)) from error

    def stop(self) -> None:
        """From any thread: there is to be no process from now on."""
        self._stopped = True
        self._hang_up()

    def _hang_up(self) -> None:
        """From any thread: the process ends as soon as it notices, whatever it does."""
        process = self._process
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def kill(self) -> None:
        """From any thread, at once."""
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # the assembler too

    def end(self) -> None:
        """Ends the process, if there is one."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _close(process)
        if self._said is not None:
            self._said.close()
            self._said = None

    def forget(self) -> None:
        """In a forked process: the child is the parent's."""
        process, self._process = self._process, None
        if process is not None:
            _close(process)
            process.returncode = 0  # nobody is to wait for it

    def _open(self) -> None:
        found = compiler()
        settings: dict[str, Any] = {"parent": os.getpid(), "packages": {"fastattn": str(_ROOT)}, "version": ""}
        if found is not None:
            settings["packages"]["triton"] = found.place
            settings["version"] = found.version
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self._process = subprocess.Popen(
            self._start(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd="/",
            env=environment(dict(os.environ)),
            bufsize=0,
            start_new_session=True,  # Ctrl-C is not meant for it
        )
        if self._stopped:  # meanwhile
            self._hang_up()
            raise EOFError
        self._write(json.dumps(settings).encode())

    def _write(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        view = memoryview(len(data).to_bytes(8, "little") + data)
        while view:
            view = view[self._process.stdin.write(view) or 0 :]

    def _read(self) -> bytes:
        deadline = time.monotonic() + self._timeout
        return self._bytes(int.from_bytes(self._bytes(8, deadline), "little"), deadline)

    def _bytes(self, count: int, deadline: float) -> bytes:
        process = self._process
        if process is None or process.stdout is None:
            raise EOFError
        parts = []
        while count:
            if not _readable(process.stdout.fileno(), deadline - time.monotonic()):
                raise TimeoutError(f"no answer within {self._timeout:.0f} s")
            part = process.stdout.read(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _why(self, error: Exception) -> str:
        """What happened to the process, which is ended, and its last words."""
        process, text = self._process, str(error)
        if process is not None and isinstance(error, (EOFError, BrokenPipeError)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            text = f"the compiler's process ended with status {process.returncode}"
        if self._said is not None:
            self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 4000))
            lines = self._said.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            text += f": {last}" if last else ""
        self.end()
        return text


def _readable(handle: int, seconds: float) -> bool:
    """(`select.select` takes no handle above 1023.)"""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1e3))


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
