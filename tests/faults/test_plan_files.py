"""Plan files that are damaged, and disks that do not take them: a plan is built then, and nobody hears of it."""

from __future__ import annotations

import errno
import hmac
import itertools
import os
import random
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cudnn_library import use_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.backends.cudnn import disk
from fastattn.backends.cudnn.graphs import Operand, PlanKey
from fastattn.backends.cudnn.plan import Plan
from fastattn.backends.cudnn.plan_cache import PlanCache
from fastattn.common import disk as files
from fastattn.common import folder as folders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")

PAYLOAD = b"a plan: " + bytes(range(256)) * 8
KEY = PlanKey("forward", 0, (Operand("q", (1, 1, 7, 8), (8, 8, 8, 1), torch.float16),))
HEADER = len(disk.FILES.magic) + 32 + 8


class Cudnn:
    """Takes what it is given, and remembers it: the real one would believe anything."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.built = 0

    def pygraph(self, handle: Any = None) -> Any:
        return SimpleNamespace(
            deserialize=lambda numbers: self.taken.append(bytes(numbers)),
            serialize=lambda: PAYLOAD,
            get_workspace_size=lambda: 0,
        )

    def build(self, key: PlanKey) -> Plan:
        self.built += 1
        return Plan(key, self.pygraph())


@pytest.fixture
def cudnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    found = Cudnn()
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr(disk, "_environment", lambda device: "machine A")
    use_library(monkeypatch, found)
    monkeypatch.setattr(Plan, "build", staticmethod(found.build))
    return found


def fresh() -> Plan:
    """The plan as a new process gets it."""
    return PlanCache().get(KEY)


@pytest.fixture
def file(cudnn: Cudnn, tmp_path: Path) -> Path:
    """A whole plan file."""
    assert fresh().key == KEY
    assert (cudnn.built, cudnn.taken) == (1, [])
    fresh()
    assert (cudnn.built, cudnn.taken) == (1, [PAYLOAD]), "the second process need not build"
    cudnn.built, cudnn.taken = 0, []
    (found,) = (tmp_path / "plans").glob("*.plan")
    return found


def secret(folder: Path) -> bytes:
    """What a plan in this folder is signed with."""
    with folders.opened(folder) as handle:
        return folders.key(handle)


def plan_files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "plans").glob("*.plan*"))


def regions(whole: bytes) -> dict[str, range]:
    """The parts of a plan file."""
    label = HEADER + len(disk._label(KEY))
    ends = [0, len(disk.FILES.magic), HEADER - 8, HEADER, label, len(whole)]
    assert whole[HEADER:label] == disk._label(KEY) and whole[label:] == PAYLOAD
    names = ("magic", "digest", "length", "label", "payload")
    return {name: range(*pair) for name, pair in zip(names, itertools.pairwise(ends))}


def bits(data: bytearray, place: int) -> None:
    data[place] ^= 1 << random.randrange(8)


def zeros(data: bytearray, place: int) -> None:
    """A block that was never written: what a crash leaves behind."""
    count = random.choice([1, 16, 512])
    data[place : place + count] = bytes(len(data[place : place + count]))


def noise(data: bytearray, place: int) -> None:
    data[place : place + 64] = random.randbytes(len(data[place : place + 64]))


def cut(data: bytearray, place: int) -> None:
    del data[place:]


def gap(data: bytearray, place: int) -> None:
    del data[place : place + random.randrange(1, 9)]


def doubled(data: bytearray, place: int) -> None:
    data[place:place] = data[place : place + random.randrange(1, 9)]


@pytest.mark.parametrize("damage", [bits, zeros, noise, cut, gap, doubled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("region", ["magic", "digest", "length", "label", "payload"])
def test_damage_never_reaches_cudnn(
    region: str, damage: Callable[[bytearray, int], None], cudnn: Cudnn, file: Path
) -> None:
    whole = file.read_bytes()
    places = regions(whole)[region]
    for place in [*places[:12], *random.sample(places, min(len(places), 40)), places[-1]]:
        data = bytearray(whole)
        damage(data, place)
        if data == whole:  # zeros over zeros
            continue
        file.write_bytes(data)
        before = cudnn.built
        assert fresh().key == KEY
        assert cudnn.taken == [], f"{damage.__name__} at byte {place} was trusted"
        assert cudnn.built == before + 1
        assert file.read_bytes() == whole, "the file is whole again"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(data=st.binary(max_size=200) | st.builds(lambda tail: disk.FILES.magic + tail, st.binary(max_size=200)))
def test_any_bytes_at_all(data: bytes) -> None:
    with pytest.raises(ValueError):
        disk.FILES.unpack(data, b"label", b"key")


@pytest.mark.parametrize("length", [0, 1, len(disk.FILES.magic), 2**31, 2**63, 2**64 - 1])
def test_a_file_that_is_whole_and_lies_about_its_label(length: int, cudnn: Cudnn, file: Path) -> None:
    """Its code is right: not damaged, but made by something else."""
    body = length.to_bytes(8, "little") + disk._label(KEY) + PAYLOAD
    file.write_bytes(disk.FILES.magic + hmac.digest(secret(file.parent), body, "sha256") + body)
    fresh()
    assert cudnn.taken == [] and cudnn.built == 1


@pytest.mark.parametrize("thing", ["folder", "pipe", "link to nothing", "link to another plan", "huge", "another's"])
def test_what_is_no_file_of_ours(thing: str, cudnn: Cudnn, file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    file.unlink()
    if thing == "folder":
        file.mkdir()
    elif thing == "pipe":
        os.mkfifo(file)  # to open it would wait for ever
    elif thing == "link to nothing":
        file.symlink_to(tmp_path / "nothing")
    elif thing == "link to another plan":
        other = tmp_path / "other.plan"
        other.write_bytes(disk.FILES.pack(PAYLOAD, b"another label", secret(file.parent)))
        file.symlink_to(other)
    elif thing == "huge":
        with file.open("wb") as sparse:
            sparse.truncate(disk.FILES.max_file + 1)
    else:
        file.write_bytes(whole)
        file.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IWGRP)
    assert fresh().key == KEY
    assert cudnn.taken == [] and cudnn.built == 1


#: Where `disk` asks the system for something: (holder, name).
STEPS: dict[str, tuple[Any, str]] = {
    "make the folder": (os, "mkdir"),
    "open anything": (os, "open"),
    "look at it": (os, "fstat"),
    "look at the root": (os, "stat"),
    "read": (os, "read"),
    "write": (os, "fdopen"),
    "name the key": (os, "link"),
    "rename it": (os, "replace"),
    "say that it was used": (os, "utime"),
    "list the folder": (os, "scandir"),
    "remove": (os, "unlink"),
}
REASONS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("reason", REASONS, ids=lambda number: errno.errorcode[number])
def test_a_disk_that_fails(
    step: str, reason: int, cudnn: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, read-only, out of handles: before there is a file, and when there is one."""

    def fail(*arguments: Any, **rest: Any) -> Any:
        raise OSError(reason, os.strerror(reason))

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], fail)
            assert fresh().key == KEY
        assert fresh().key == KEY
    assert all(payload == PAYLOAD for payload in cudnn.taken)
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 1 and fresh().key == KEY and cudnn.taken[-1] == PAYLOAD


def test_a_disk_that_is_full_in_the_middle_of_a_write(
    cudnn: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = os.fdopen

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *arguments: Full(open_(*arguments)))
        fresh()
    assert plan_files(tmp_path) == [], "what was half written would take up what room there is"
    fresh()
    assert cudnn.built == 2 and cudnn.taken == []


@pytest.mark.parametrize("way", ["the folder", "its parent", "a link in a circle", "too long a name"])
def test_a_folder_that_cannot_be(way: str, cudnn: Cudnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.write_text("a file")
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    folder = {
        "the folder": there, "its parent": there / "plans", "a link in a circle": circle,
        "too long a name": tmp_path / ("x" * 300),
    }[way]  # fmt: skip
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(folder))
    for turn in range(2):
        assert fresh().key == KEY
        assert cudnn.built == turn + 1
    assert there.read_text() == "a file"


def test_a_folder_that_may_only_be_read(cudnn: Cudnn, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cache that an administrator filled."""
    if os.geteuid() == 0:  # who may write anywhere
        open_ = os.open

        def refuse(*arguments: Any, **rest: Any) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied")

        def only_read(path: Any, flags: int, *arguments: Any, **rest: Any) -> int:
            return refuse() if flags & os.O_CREAT else open_(path, flags, *arguments, **rest)

        monkeypatch.setattr(os, "open", only_read)
        for step in ("say that it was used", "remove"):
            monkeypatch.setattr(*STEPS[step], refuse)
    else:
        file.chmod(0o400)
        file.parent.chmod(0o500)
    try:
        fresh()
        assert (cudnn.built, cudnn.taken) == (0, [PAYLOAD]), "it is read"
        monkeypatch.setattr(disk, "_environment", lambda device: "machine B")
        fresh()
        assert cudnn.built == 1, "and what is not there is built"
    finally:
        file.parent.chmod(0o700)


def test_no_home(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user without an entry in the password file: no plan is kept, and every one is built."""
    import pwd

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("FASTATTN_PLAN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert files.directory() is None
    for turn in range(2):
        assert fresh().key == KEY
        assert cudnn.built == turn + 1


@pytest.mark.parametrize("room", [0, 10, 60, 1000])
def test_a_file_that_may_not_grow(room: int, cudnn: Cudnn, tmp_path: Path) -> None:
    """A quota, by the system's own hand: for the key first, then for the plan."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        fresh()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert plan_files(tmp_path) == []
    fresh()
    fresh()
    assert cudnn.built == 2 and cudnn.taken == [PAYLOAD]
