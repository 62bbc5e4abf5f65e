"""Plans on disk beside other users: what they could have put there is neither read, overwritten, written through
nor removed."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from other_users import ALICE, MALLORY, as_root, user
from plan_files import PAYLOAD, key

from fastattn.backends.cudnn import disk
from fastattn.common import disk as files
from fastattn.common import folder as folders
from fastattn.common import notice

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
HOSTILE = b"hostile bytes"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of this user's that others can reach, which what pytest makes is not."""
    found = Path(tempfile.mkdtemp())
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


@pytest.fixture(autouse=True)
def folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(place / "plans"))
    monkeypatch.setattr(disk, "_environment", lambda device: "machine A")
    return place / "plans"


def plan_of(folder: Path, length: int = 7) -> Path:
    return folder / disk.FILES.name(disk._label(key(length)))


def forged(secret: bytes = bytes(32)) -> bytes:
    """A plan file that is right in every way but that its writer did not know the folder's key."""
    return disk.FILES.pack(HOSTILE, disk._label(key()), secret)


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is below a folder: kind and permissions, and what a file holds or a link says."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (info.st_mode, data)
    return found


# --- what was not written here


def test_a_plan_without_the_key_is_not_used(folder: Path) -> None:
    """Owner, permissions, name, label and length are right: unpacked from an archive, say."""
    disk.store(key(), PAYLOAD)
    plan_of(folder).write_bytes(forged())
    assert disk.load(key()) is None
    (folder / folders.KEY).unlink()
    assert disk.load(key()) is None


def test_a_folder_that_was_copied_with_its_key_is_not_used(folder: Path, place: Path, monkeypatch: Any) -> None:
    """An archive of a stranger's folder, key and all, with permissions kept."""
    disk.store(key(), PAYLOAD)
    shutil.copytree(folder, place / "copy")
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(place / "copy"))
    assert (place / "copy" / folders.KEY).read_bytes() == (folder / folders.KEY).read_bytes()
    assert disk.load(key()) is None
    disk.store(key(), PAYLOAD[::-1])
    assert disk.load(key()) == PAYLOAD[::-1], "it has a key of its own now"


def test_a_plan_of_another_folder_is_not_used(folder: Path, place: Path, monkeypatch: Any) -> None:
    disk.store(key(), HOSTILE)
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(place / "other"))
    disk.store(key(), PAYLOAD)
    shutil.copy2(plan_of(folder), plan_of(place / "other"))
    assert disk.load(key()) is None


def test_a_plan_replayed_under_another_name_is_not_used(folder: Path) -> None:
    disk.store(key(8), PAYLOAD)
    plan_of(folder, 8).rename(plan_of(folder))
    assert disk.load(key()) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_know_is_made_anew(folder: Path, mode: int) -> None:
    disk.store(key(), PAYLOAD)
    (folder / folders.KEY).chmod(mode)
    assert disk.load(key()) is None
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == PAYLOAD
    assert stat.S_IMODE((folder / folders.KEY).stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"", b"x", bytes(53), b"fastattn key\n" + bytes(40), bytes(10_000)])
def test_a_damaged_key_is_made_anew(folder: Path, damage: bytes) -> None:
    disk.store(key(), PAYLOAD)
    (folder / folders.KEY).write_bytes(damage)
    assert disk.load(key()) is None
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == PAYLOAD


def test_processes_that_start_together_use_one_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one made its key between our look and our making one."""
    link = os.link

    def late(*arguments: Any, **rest: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        disk.store(key(8), PAYLOAD)
        link(*arguments, **rest)

    monkeypatch.setattr(os, "link", late)
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == disk.load(key(8)) == PAYLOAD
    assert not list(folder.glob("*.tmp"))


def test_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **rest: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == PAYLOAD
    assert not list(folder.glob("*.tmp"))


# --- what stands in a plan's place


def _socket(path: Path, good: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SWAPS: dict[str, Callable[[Path, Path], Any]] = {
    "link": lambda path, good: path.symlink_to(good),
    "hard link": lambda path, good: path.hardlink_to(good),
    "pipe": lambda path, good: os.mkfifo(path),
    "folder": lambda path, good: path.mkdir(),
    "link to a device": lambda path, good: path.symlink_to("/dev/zero"),
    "socket": _socket,
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("of", ["plan", "key"])
def test_what_is_no_plain_file_is_not_read(folder: Path, place: Path, swap: str, of: str) -> None:
    """Even where it leads to the very bytes that were written."""
    disk.store(key(), PAYLOAD)
    path = plan_of(folder) if of == "plan" else folder / folders.KEY
    good = place / "good"
    path.rename(good)
    SWAPS[swap](path, good)
    before = good.read_bytes()
    if of == "plan" or swap != "hard link":  # (the key itself, under a second name of the user's, is the key)
        assert disk.load(key()) is None
    disk.store(key(), PAYLOAD[::-1])
    assert disk.load(key()) in (None, PAYLOAD[::-1])
    assert good.read_bytes() == before, "nothing is written through a link"
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)


@as_root
def test_a_device_is_not_read(folder: Path) -> None:
    disk.store(key(), PAYLOAD)
    plan_of(folder).unlink()
    try:
        os.mknod(plan_of(folder), stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except OSError:
        pytest.skip("this container makes no devices: not tried")
    assert disk.load(key()) is None


def test_a_file_that_is_exchanged_between_the_look_and_the_read(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is put in its place after the check: the file that was checked is read."""
    disk.store(key(), PAYLOAD)
    fstat = os.fstat
    (place / "evil").write_bytes(b"evil")

    def exchange(handle: int) -> os.stat_result:
        found = fstat(handle)
        if stat.S_ISREG(found.st_mode):
            os.replace(place / "evil", plan_of(folder))
            monkeypatch.setattr(os, "fstat", fstat)
        return found

    monkeypatch.setattr(os, "fstat", exchange)
    assert disk.load(key()) == PAYLOAD
    assert plan_of(folder).read_bytes() == b"evil"


def test_a_folder_that_is_exchanged_after_the_check(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the folder: what is written goes into the one that was checked."""
    disk.store(key(), PAYLOAD)
    make_key = folders.make_key

    def exchange(handle: int) -> bytes:
        folder.rename(place / "checked")
        (place / "victim").mkdir()
        folder.symlink_to(place / "victim")
        return make_key(handle)

    monkeypatch.setattr(folders, "make_key", exchange)
    disk.store(key(8), PAYLOAD)
    assert everything(place / "victim") == {}
    assert plan_of(place / "checked", 8).exists()


# --- what is removed


def test_only_plans_are_ever_removed(folder: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """A folder in which the user has other things, some with names much like ours."""
    disk.store(key(0), PAYLOAD)
    size = plan_of(folder, 0).stat().st_size
    monkeypatch.setattr(files, "MAX_BYTES", 2 * size)
    hashed = "0" * 64
    others = [
        "business.plan", "draft.tmp", f"{hashed}.tmp", f"{hashed}.plan.bak", f"{hashed}.PLAN", f"{hashed[1:]}.plan",
        f"x{hashed}.plan", f"{hashed}.plan.tmp", f"{hashed}.plan\n", "tmpabcdefgh.tmp", "key.0123456789abcdef.tmp",
    ]  # fmt: skip
    for name in others:
        (folder / name).write_bytes(bytes(3 * size))
        os.utime(folder / name, (1, 1))
    (folder / ("1" * 64 + ".plan")).mkdir()
    (folder / ("2" * 64 + ".plan")).symlink_to(place / "elsewhere")
    (place / "elsewhere").write_bytes(bytes(3 * size))
    kept = {path.name for path in folder.iterdir()} - {plan_of(folder, 0).name}
    for length in range(1, 6):
        disk.store(key(length), PAYLOAD)
        os.utime(plan_of(folder, length), (1000 + length, 1000 + length))
    left = {path.name for path in folder.iterdir()}
    assert kept <= left
    assert len(left - kept) == 2
    assert (place / "elsewhere").exists()


@as_root
def test_files_of_others_are_not_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.store(key(0), PAYLOAD)
    os.chown(plan_of(folder, 0), MALLORY, MALLORY)
    monkeypatch.setattr(files, "MAX_BYTES", 1)
    disk.store(key(1), PAYLOAD)
    assert plan_of(folder, 0).exists() and not plan_of(folder, 1).exists()


# --- whose folder it is


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o757, 0o720])
def test_a_folder_that_others_may_write_to_is_not_used(folder: Path, mode: int) -> None:
    disk.store(key(), PAYLOAD)
    folder.chmod(mode)
    before = everything(folder)
    assert disk.load(key()) is None
    disk.store(key(8), PAYLOAD)
    disk.discard(key())
    assert everything(folder) == before
    assert "may write to it" in (files.refusal() or "")
    folder.chmod(0o755)
    assert disk.load(key()) == PAYLOAD
    assert files.refusal() is None


def test_a_folder_below_one_that_all_may_write_to_is_not_used(folder: Path, place: Path) -> None:
    disk.store(key(), PAYLOAD)
    place.chmod(0o777)
    assert disk.load(key()) is None
    assert "exchange" in (files.refusal() or "")
    place.chmod(0o1777)  # as /tmp
    assert disk.load(key()) == PAYLOAD
    place.chmod(0o775)  # a umask of 002
    assert disk.load(key()) == PAYLOAD


def test_what_is_made_is_for_the_user_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(place / "a" / "b" / "plans"))
    old = os.umask(0)
    try:
        disk.store(key(), PAYLOAD)
    finally:
        os.umask(old)
    for path in (place / "a").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o700
    assert disk.load(key()) == PAYLOAD


def test_links_of_the_user_are_followed(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on another disk, as many have it; also to what is not there yet."""
    (place / "scratch").mkdir()
    (place / "cache").symlink_to("scratch/../scratch")
    (place / "scratch" / "plans").symlink_to(place / "real")
    (place / "real").mkdir()
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(place / "cache" / "plans"))
    disk.store(key(), PAYLOAD)
    assert disk.load(key()) == PAYLOAD
    assert plan_of(place / "real").exists()


@as_root
def test_links_of_others_are_not_followed(folder: Path, place: Path) -> None:
    """Mallory's link, in a folder like /tmp, to a folder of the user's."""
    place.chmod(0o1777)
    (place / "mine").mkdir(mode=0o700)
    with user(MALLORY):
        folder.symlink_to(place / "mine")
    disk.store(key(), PAYLOAD)
    assert everything(place / "mine") == {}
    assert "what leads to it" in (files.refusal() or "")


@as_root
def test_a_folder_that_was_made_before_us_is_not_used(folder: Path, place: Path) -> None:
    """Mallory guesses the name of alice's folder in /tmp and makes it first, plan, key and all."""
    place.chmod(0o1777)
    with user(MALLORY):
        disk.store(key(), HOSTILE)
        assert disk.load(key()) == HOSTILE
        folder.chmod(0o777)
        plan_of(folder).chmod(0o644)
    before = everything(folder)
    for uid in (ALICE, 0):
        with user(uid):
            assert disk.load(key()) is None
            disk.store(key(8), PAYLOAD)
            disk.discard(key())
    assert everything(folder) == before


@as_root
def test_root_in_the_home_of_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sudo that keeps HOME: nothing is trusted there, nothing written or made."""
    home = place / "alice"
    home.mkdir()
    os.chown(home, ALICE, ALICE)
    monkeypatch.delenv("FASTATTN_PLAN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    disk.store(key(), PAYLOAD)
    assert everything(home) == {}
    with user(ALICE):
        disk.store(key(), HOSTILE)
        assert disk.load(key()) == HOSTILE
    before = everything(home)
    assert disk.load(key()) is None
    disk.store(key(8), PAYLOAD)
    disk.discard(key())
    assert everything(home) == before
    # Not either where only the last folder is root's, as after an earlier version: alice can exchange it.
    for path in (home / ".cache" / "fastattn" / "plans").glob("*"):
        os.chown(path, 0, 0)
    os.chown(home / ".cache" / "fastattn" / "plans", 0, 0)
    assert disk.load(key()) is None


@as_root
def test_plans_of_another_in_a_folder_of_ours(folder: Path) -> None:
    disk.store(key(), PAYLOAD)
    os.chown(plan_of(folder), MALLORY, MALLORY)
    assert disk.load(key()) is None
    os.chown(plan_of(folder), 0, 0)
    assert disk.load(key()) == PAYLOAD
    os.chown(folder / folders.KEY, MALLORY, MALLORY)
    assert disk.load(key()) is None


@as_root
def test_where_only_passing_is_allowed(folder: Path, place: Path) -> None:
    """A home below a folder that its users may not list."""
    (place / "plans").mkdir()
    os.chown(place / "plans", ALICE, ALICE)
    place.chmod(0o711)
    with user(ALICE):
        disk.store(key(), PAYLOAD)
        assert disk.load(key()) == PAYLOAD


# --- where it is


def test_a_tilde_is_the_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    for chosen in ("~/plans", "~"):
        monkeypatch.setenv("FASTATTN_PLAN_CACHE", chosen)
        assert files.directory() == Path(str(place) + chosen[1:])


@pytest.mark.parametrize("chosen", ["plans", "./plans", "../plans", "~nobody-of-this-name/plans", " /plans"])
def test_a_relative_folder_is_refused_with_a_warning(
    chosen: str, place: Path, monkeypatch: pytest.MonkeyPatch, fresh_warnings: None
) -> None:
    """It would be another one in each directory that a program is started in."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", chosen)
    with pytest.warns(notice.FastattnWarning, match="expected an absolute path"):
        disk.store(key(), PAYLOAD)
    assert disk.load(key()) is None
    assert everything(place) == {}


@pytest.mark.parametrize("base", ["cache", "./cache", "~/cache", ""])
def test_a_relative_xdg_folder_is_no_folder(base: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification wants it."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("FASTATTN_PLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", str(place / "home"))
    assert files.directory() == place / "home" / ".cache" / "fastattn" / "plans"
    monkeypatch.setenv("HOME", "home")
    assert files.directory() is None


def test_no_descriptor_is_left_open(folder: Path, place: Path) -> None:
    disk.store(key(), PAYLOAD)
    disk.load(key())

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for mode in (0o700, 0o777):
        folder.chmod(mode)
        for _ in range(3):
            disk.store(key(), PAYLOAD)
            disk.load(key())
            disk.load(key(99))
            disk.discard(key(99))
    plan_of(folder).write_bytes(b"")
    disk.load(key())
    assert count() == before
