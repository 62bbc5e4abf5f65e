"""The processes that compile: a few at a time, started when there is work, ended when there is none.

Each has a thread of this process, which waits for it without the interpreter's lock.
"""

from __future__ import annotations

import atexit
import heapq
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import IO, Any

from ...._compat.triton_compiler import compiler, environment
from ....common.forks import after_fork
from .flag_set import Binary, FlagSet

IDLE = 30.0  #: seconds without work after which a process ends: it holds 200 MB
PATIENCE = 3.0  #: seconds in which a process that is no longer needed may tidy up and end by itself
TIMEOUT = 600.0  #: seconds for one binary, which takes 2 to 10 on an idle machine
MOST_IN_BACKGROUND, MOST = 4, 16  #: processes, and at most half or all of the cores

_pools: weakref.WeakSet[Compilers] = weakref.WeakSet()
_ROOT = Path(__file__).parents[3]


class CompileError(Exception):
    """The compiler says no; it would again."""


class NoCompiler(Exception):
    """The compiler's process did not start, or ended before it had answered. Another one may do better."""


Compile = Callable[[FlagSet], Binary]  #: raises CompileError or NoCompiler
Task = Callable[[Compile], None]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class Compilers:
    """Does tasks that compile, each with a process of its own thread's; those that somebody waits for come first.

    At exit the processes are killed and the queue is dropped; a forked child starts afresh.
    """

    def __init__(self, start: Callable[[], Sequence[str]] = command, idle: float = IDLE, most: int = 0) -> None:
        """start: see `command`. most: processes in the background, 0: by the cores."""
        self._make = lambda: Child(start)
        self._idle = idle
        self._most = most or max(1, min(MOST_IN_BACKGROUND, cores() // 2))
        self._children: set[Child] = set()
        _pools.add(self)
        after_fork(self, Compilers._forked)
        self._reset()

    def _reset(self) -> None:
        self._tasks: list[tuple[bool, int, Task]] = []  # a heap: whether it can wait, its number, the task
        self._count = 0
        self._state = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._working = 0
        self._width = self._most
        self._stopped = False

    def _forked(self) -> None:
        for child in self._children:
            child.forget()
        self._children = set()
        self._reset()

    def submit(self, task: Task, waiting: bool = False) -> bool:
        """Has a task done. waiting: somebody waits for it. False where there is nobody to do it."""
        with self._state:
            if self._stopped:
                return False
            self._count += 1
            heapq.heappush(self._tasks, (not waiting, self._count, task))
            if not self._start_thread():
                self._tasks = [found for found in self._tasks if found[2] is not task]
                heapq.heapify(self._tasks)
                return False
            self._state.notify()
            return True

    def _start_thread(self) -> bool:
        """One more, where there is work for it. False where there is none at all."""
        free = len(self._threads) - self._working
        if len(self._tasks) > free and len(self._threads) < self._width:
            thread = threading.Thread(target=self._run, name="fastattn-compiler", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                logging.getLogger("fastattn").debug("no thread for a compiler: %s", error)
            else:
                self._threads.add(thread)
        return bool(self._threads)

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Within the block there may be as many processes as cores: somebody waits for much."""
        with self._state:
            self._width = max(self._most, min(MOST, cores()))
        try:
            yield
        finally:
            with self._state:
                self._width = self._most
                self._state.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is queued or in hand. False if that takes longer than `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: not self._tasks and not self._working, timeout)

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the processes and drops the queue; nothing is taken on afterwards."""
        with self._state:
            self._stopped = True
            self._tasks.clear()
            self._state.notify_all()
            threads, children = list(self._threads), list(self._children)
        for child in children:
            child.stop()
        end = time.monotonic() + PATIENCE
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, end - time.monotonic()))
        for child in children:
            child.kill()
        for thread in others:
            thread.join(timeout)

    def _run(self) -> None:
        child, me = self._make(), threading.current_thread()
        with self._state:
            self._children.add(child)
        try:
            while (task := self._next(me)) is not None:
                try:
                    task(child.compile)
                except Exception:  # the next task is not to blame
                    logging.getLogger("fastattn").exception("a task of the compiler's failed")
                finally:
                    with self._state:
                        self._working -= 1
                        self._state.notify_all()
        finally:
            child.end()
            with self._state:
                self._threads.discard(me)
                self._children.discard(child)

    def _next(self, me: threading.Thread) -> Task | None:
        """None: the thread is to end. It is no longer counted then, under the same lock: a task that comes at once
        starts another."""
        with self._state:
            end = time.monotonic() + self._idle
            while not self._stopped:
                if self._tasks and len(self._threads) <= max(self._width, 1):
                    self._working += 1
                    return heapq.heappop(self._tasks)[2]
                left = end - time.monotonic()
                if left <= 0 or len(self._threads) > self._width:
                    break
                self._state.wait(left)
            self._threads.discard(me)
            return None


@atexit.register
def _stop_all() -> None:
    for pool in list(_pools):
        pool.stop()
