"""Plans on disk, shared by processes of which some are killed while they write: what is read is whole, always."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from plan_files import key

from fastattn.backends.cudnn import disk
from fastattn.common import disk as files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes and signals")

KEYS = range(5)  #: that all processes store and load
VERSIONS = 3  #: of what is stored for a key
SIZE = 200_000  #: bytes: larger than what a file buffers, so that a write is in several steps
HOUR = 3600
#: Where a writer stops in the middle of `disk.store`, and whether another process then finds what it wrote.
POINTS = {"empty": False, "half written": False, "written": False, "renamed": True, "tidying": True}


def payload(number: int, version: int) -> bytes:
    return bytes([number, version]) * (SIZE // 2)


def whole(number: int) -> list[bytes]:
    return [payload(number, version) for version in range(VERSIONS)]


def age(folder: Path, seconds: float) -> list[Path]:
    """Makes the temporary files look older. Returns them."""
    found = sorted(folder.glob("*.tmp"))
    for path in found:
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))
    return found


# --- in other processes


def serve() -> None:
    """Forks a process for each line that it reads: folder, command and arguments, as JSON.

    It has imported torch and done nothing with it: a new process is there in milliseconds.
    """
    disk._environment = lambda device: "machine A"  # type: ignore[assignment]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    say("ready")
    for line in sys.stdin:
        folder, name, *arguments = json.loads(line)
        if not os.fork():
            os.environ["FASTATTN_PLAN_CACHE"] = folder
            try:
                COMMANDS[name](*arguments)
            finally:
                os._exit(0)


def say(*words: Any) -> None:
    os.write(1, json.dumps([os.getpid(), *words]).encode() + b"\n")


def stop_at(point: str, number: int, version: int) -> None:
    """Stores a payload but for what comes after a point, at which it waits to be killed."""

    def stop(*arguments: Any, **rest: Any) -> Any:
        say("there")
        while True:
            signal.pause()

    class Half:
        """A file that writes half, for all to see, and stops."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def write(self, data: bytes) -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            stop()

    open_ = os.fdopen
    if point == "empty":
        os.fdopen = stop
    elif point == "half written":
        os.fdopen = lambda *arguments: Half(open_(*arguments))  # type: ignore[assignment]
    elif point == "written":
        os.replace = stop  # type: ignore[assignment]
    elif point == "renamed":
        files._trim = stop
    else:
        os.scandir = stop  # type: ignore[assignment]
    disk.store(key(number), payload(number, version))
    say("beyond")


def write_on() -> None:
    """Stores payloads until it is killed."""
    rng = random.Random(os.getpid())
    say("there")
    while True:
        number = rng.choice(KEYS)
        disk.store(key(number), payload(number, rng.randrange(VERSIONS)))


def read_on(quit_: str) -> None:
    """Stores and loads until a file appears, and says how often it found what."""
    rng, found = random.Random(os.getpid()), {"whole": 0, "nothing": 0, "damaged": 0, "stored": 0}
    good = {number: whole(number) for number in KEYS}
    say("there")
    while not Path(quit_).exists():
        number = rng.choice(KEYS)
        if rng.random() < 0.2:
            disk.store(key(number), rng.choice(good[number]))
            found["stored"] += 1
        loaded = disk.load(key(number))
        found["nothing" if loaded is None else "whole" if loaded in good[number] else "damaged"] += 1
    say(found)


COMMANDS = {"stop_at": stop_at, "write_on": write_on, "read_on": read_on}


# --- here


class Server:
    """The other side of `serve`."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parent), *sys.path]
        code = f"import sys; sys.path[:0] = {paths!r}; import test_disk_processes; test_disk_processes.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.hear()[1] == "ready"

    def tell(self, *command: Any) -> int:
        """Has a command done in a new process. Returns its number, when that says that it is there."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([os.environ["FASTATTN_PLAN_CACHE"], *command]).encode() + b"\n")
        self.process.stdin.flush()
        pid, word = self.hear()
        assert word == "there", f"{command}: {word}"
        return int(pid)

    def hear(self) -> list[Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60.0)[0], "nothing was said for a minute"
        said: list[Any] = json.loads(self.process.stdout.readline())
        return said


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    for _ in range(1000):  # nobody's child here, so there is nothing to wait for
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"{pid} is still there")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr(disk, "_environment", lambda device: "machine A")
    return tmp_path / "plans"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    with found.process:
        yield found
        os.killpg(found.process.pid, signal.SIGKILL)  # and with it whatever a test that failed left running


@contextmanager
def reader(server: Server, folder: Path) -> Iterator[dict[str, int]]:
    """Another process that stores and loads meanwhile. Filled afterwards: what it found."""
    found: dict[str, int] = {}
    quit_ = folder.with_name("quit")
    quit_.unlink(missing_ok=True)
    server.tell("read_on", str(quit_))
    yield found
    quit_.touch()
    found |= server.hear()[1]


def test_killed_at_each_point_of_writing(server: Server, folder: Path) -> None:
    own = len(KEYS)  # a key that only the killed one stores
    with reader(server, folder) as found:
        for point, arrives in POINTS.items():
            before = set(folder.glob("*.tmp"))
            disk.store(key(own), payload(own, 0))
            pid = server.tell("stop_at", point, own, 1)
            for stage in ("alive", "dead"):
                assert disk.load(key(own)) == payload(own, int(arrives)), (point, stage)
                if stage == "alive":
                    kill(pid)
            disk.discard(key(own))
            kill(server.tell("stop_at", point, own, 1))
            assert disk.load(key(own)) == (payload(own, 1) if arrives else None), f"{point}, with nothing there before"
            for number in KEYS:
                assert disk.load(key(number)) in (None, *whole(number))
            assert arrives or len(set(folder.glob("*.tmp")) - before) >= 2, "the killed ones' files"
    assert found["damaged"] == 0 and found["whole"] and found["stored"], found


def test_killed_at_any_moment_while_others_store_and_load(server: Server, folder: Path) -> None:
    rng = random.Random()
    with reader(server, folder) as found:
        for _ in range(15):
            pid = server.tell("write_on")
            end = time.monotonic() + rng.uniform(0.0, 0.05)
            while time.monotonic() < end:
                number = rng.choice(KEYS)
                assert disk.load(key(number)) in (None, *whole(number))
            kill(pid)
    assert found["damaged"] == 0 and found["whole"] and found["stored"], found
    # The next start: what is there is whole, what is stored is found, and nothing half written stays.
    for number in KEYS:
        assert disk.load(key(number)) in (None, *whole(number))
        disk.store(key(number), payload(number, 2))
    with reader(server, folder) as found:
        time.sleep(0.1)
    assert found["damaged"] == found["nothing"] == 0 and found["whole"], found
    age(folder, 2 * HOUR)
    disk.store(key(0), payload(0, 0))
    assert len(list(folder.iterdir())) == len(KEYS) + 1, "five plans, the key and nothing else"


def test_what_killed_ones_leave_goes_after_an_hour(server: Server, folder: Path) -> None:
    for point in ("empty", "half written", "written"):
        kill(server.tell("stop_at", point, 0, 0))
    left = age(folder, 0.9 * HOUR)
    assert len(left) == 3
    disk.store(key(1), payload(1, 0))
    assert all(path.exists() for path in left), "somebody may still be writing them"
    age(folder, 0.2 * HOUR)
    alive = server.tell("stop_at", "half written", 0, 0)
    disk.store(key(1), payload(1, 1))
    assert not any(path.exists() for path in left)
    assert len(list(folder.glob("*.tmp"))) == 1, "that of the one that is still writing"
    kill(alive)
    assert disk.load(key(1)) == payload(1, 1)
    assert disk.load(key(0)) is None


def test_what_killed_ones_leave_counts_as_room(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are killed within the hour: all files together stay within the limit."""
    limit = 5 * SIZE
    monkeypatch.setattr(files, "MAX_BYTES", limit)
    for turn in range(12):
        kill(server.tell("stop_at", "written", 0, 0))
        for path in age(folder, 60.0):  # all that are there: the older, the sooner they go
            assert path.stat().st_size > SIZE
        disk.store(key(1), payload(1, turn % VERSIONS))
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    assert 0 < len(list(folder.glob("*.tmp"))) < 5
    assert disk.load(key(1)) == payload(1, 11 % VERSIONS)
