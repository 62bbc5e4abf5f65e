"""Plans on disk: what is not whole, ours and exactly what was asked for is not used, and nothing raises."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cudnn_library import use_library
from plan_files import PAYLOAD, key

from fastattn._compat import torch as torch_internals
from fastattn.backends.cudnn import disk
from fastattn.backends.cudnn.graphs import PlanKey
from fastattn.backends.cudnn.plan_cache import PlanCache
from fastattn.common import disk as files
from fastattn.common.folder import KEY


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr(disk, "_environment", lambda device: "machine A")
    return tmp_path / "plans"


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.plan")
    return found


def test_what_is_stored_is_found(folder: Path) -> None:
    assert disk.load(key()) is None
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == PAYLOAD
    assert the_file(folder).suffix == ".plan"
    disk.store(key(), PAYLOAD[::-1])
    assert disk.load(key()) == PAYLOAD[::-1]
    disk.discard(key())
    assert disk.load(key()) is None


@pytest.mark.parametrize(
    "other",
    [
        key(8),
        key(left=1),
        key(right=0),
        key(lower_right=True),
        key(deterministic=True),
        key(device=1),
        key(direction="backward"),
    ],
)
def test_another_key_is_another_file(other: PlanKey) -> None:
    disk.store(key(), PAYLOAD)
    assert disk.load(other) is None


def test_another_machine_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    disk.store(key(), PAYLOAD)
    monkeypatch.setattr(disk, "_environment", lambda device: "machine B")
    assert disk.load(key()) is None


def test_the_environment_names_all_that_can_make_a_plan_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = SimpleNamespace(name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=80)
    library = SimpleNamespace(cudnn=SimpleNamespace(__version__="1.28.0"), version=91900)
    found = set()

    def look() -> None:
        disk._environment.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        monkeypatch.setattr(disk.runtime, "frontend", lambda: library)
        found.add(disk._environment(0))

    look()
    for holder, name, value in (
        (device, "name", "other"), (device, "major", 10), (device, "minor", 3), (device, "multi_processor_count", 1),
        (device, "total_memory", 1), (library.cudnn, "__version__", "1.29.0"), (library, "version", 92000),
        (torch.version, "cuda", "13.9"), (disk, "FORMAT", 99), (torch_internals, "driver_version", lambda: 12345),
    ):  # fmt: skip
        monkeypatch.setattr(holder, name, value)
        look()
    assert len(found) == 11
    disk._environment.cache_clear()


def test_damage_in_any_byte_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk.store(key(), PAYLOAD)
    path = the_file(folder)
    whole = path.read_bytes()
    caplog.set_level(logging.DEBUG, "fastattn")
    for length in {*range(0, len(whole), 17), *range(100), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert disk.load(key()) is None, f"cut to {length}"
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        assert disk.load(key()) is None, f"byte {place}"
    path.write_bytes(whole + b"x")
    assert disk.load(key()) is None
    assert "skipped" in caplog.text
    path.write_bytes(whole)
    assert disk.load(key()) == PAYLOAD


def test_a_file_of_another_key_under_this_name_is_not_used(folder: Path) -> None:
    disk.store(key(8), PAYLOAD)
    foreign = the_file(folder)
    disk.store(key(), PAYLOAD)
    own = next(path for path in folder.glob("*.plan") if path != foreign)
    own.write_bytes(foreign.read_bytes())
    assert disk.load(key()) is None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_file_that_others_may_write_is_not_used(folder: Path) -> None:
    disk.store(key(), PAYLOAD)
    path = the_file(folder)
    path.chmod(0o666)
    assert disk.load(key()) is None
    path.chmod(0o600)
    assert disk.load(key()) == PAYLOAD
    path.unlink()
    path.mkdir()
    assert disk.load(key()) is None


def test_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) is None
    assert not folder.exists()


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTATTN_PLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.directory() == tmp_path / "fastattn" / "plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert files.directory() == tmp_path / "home" / ".cache" / "fastattn" / "plans"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert files.directory() is None
    assert disk.load(key()) is None
    disk.store(key(), PAYLOAD)


def test_a_disk_that_does_not_take_files(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "file" / "plans"))
    (tmp_path / "file").write_text("in the way")
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) is None

    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(folder))

    def full(*args: Any, **rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) is None
    assert [path.name for path in folder.iterdir()] == [KEY], "nothing half written is left"


def test_the_least_recently_used_files_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.store(key(0), PAYLOAD)
    size = the_file(folder).stat().st_size
    monkeypatch.setattr(files, "MAX_BYTES", 4 * size + 10)
    for length in range(1, 4):
        disk.store(key(length), PAYLOAD)
    for age, length in enumerate((0, 3, 2, 1)):  # 1 is the oldest
        path = folder / disk.FILES.name(disk._label(key(length)))
        os.utime(path, (1000 - age, 1000 - age))
    assert disk.load(key(1)) == PAYLOAD, "used now"
    disk.store(key(9), PAYLOAD)
    assert disk.load(key(2)) is None
    assert all(disk.load(key(length)) == PAYLOAD for length in (0, 1, 3, 9))


def test_two_processes_one_killed_while_it_writes(folder: Path) -> None:
    """Whatever the moment of death, what can be read afterwards is whole."""
    program = (
        "import sys, torch; from fastattn.backends.cudnn import disk; disk._environment = lambda device: 'machine A';"
        f"sys.path.insert(0, {str(Path(__file__).parents[2] / 'helpers')!r}); from plan_files import key, PAYLOAD\n"
        "print('ready', flush=True)\n"
        "while True:\n    [disk.store(key(n), PAYLOAD * 50) for n in range(5)]"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline().strip() == b"ready"
        found = 0
        for turn in range(400):
            if turn == 200:
                writers[0].kill()
            payload = disk.load(key(turn % 5))
            assert payload in (None, PAYLOAD * 50)
            found += payload is not None
        assert found > 100
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    assert all(disk.load(key(n)) == PAYLOAD * 50 for n in range(5))


def test_a_plan_that_cudnn_will_not_have_is_built(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Graph:
        def __init__(self, handle: Any = None) -> None: ...

        def deserialize(self, payload: list[int]) -> None:
            raise RuntimeError(f"cuDNN does not like {len(payload)} bytes")

    built = []

    def build(key: PlanKey) -> SimpleNamespace:
        built.append(key)
        return SimpleNamespace(store=lambda: disk.store(key, b"new"))

    use_library(monkeypatch, SimpleNamespace(pygraph=Graph))
    disk.store(key(), PAYLOAD)
    cache = PlanCache(build=build)
    cache.get(key())
    assert built == [key()]
    assert disk.load(key()) == b"new"
    assert (cache.stats()["builds"], cache.stats()["disk_loads"]) == (1, 0)
