"""Writes the files of every command: whole or not at all, and never over what must not be replaced.

A file is written beside its place, brought to the disk and renamed: a reader finds the old one or the new one, and a
full disk leaves the old one. It keeps its permissions, and a new one gets those of the umask. Of a symbolic link to a
file the file is replaced, the link stays. What is no file is not replaced: into a pipe (`>(jq .)`), the null device and
the command's own output (`/dev/stdout`) the text is written; anything else is refused: directories, disks and other
devices, sockets, links to nothing. `check` says all that before a measurement of many minutes, and changes nothing.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MOST_BYTES = 16 << 20  #: of a result file
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_OLD = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


class NotWrittenError(OSError):
    """What was found could not be written: the disk is full, say. One line."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


def check(files: Iterable[str | Path | None], inputs: Iterable[str | Path] = ()) -> None:
    """Raises ValueError, naming it, for a file that could not be written, that is two of them at once, or that the
    command reads from. None: not asked for. Changes nothing."""
    paths = [check_writable(path) for path in files if path is not None]
    real = [path for path in paths if _kind(path) == "file"]
    for i, path in enumerate(real):
        if any(_same(path, other) for other in real[:i]):
            raise ValueError(f"{path}: expected another name for each file that is written")
        for source in inputs:
            if _same(path, Path(source)) or _part_of(path, Path(source)):
                raise ValueError(f"{path}: expected another file to write, this one is read")


def check_writable(path: str | Path) -> Path:
    """The path, once it is certain that a file can be written there. Raises ValueError naming it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{path}: expected the name of a file to write, this is a directory")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: cannot be written, there is no directory {path.parent}")
        if _kind(path) == "file":
            _check_place(_place(path))
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def write(path: str | Path, data: str | bytes) -> None:
    """Writes a file. Raises OSError, with the path and the reason in its text, leaving what was there."""
    path, data = Path(path), data.encode("utf-8") if isinstance(data, str) else data
    try:
        kind = _kind(path)
        if kind == "file":
            _replace(_place(path), data)
        else:
            _write_into(path, data, kind)
    except OSError as error:
        raise NotWrittenError(error.errno, error.strerror or str(error), str(path)) from error


def _kind(path: Path) -> str:
    """ "file": to be made or replaced; "standard": what this process prints to; "open": to be written into. OSError for
    what is neither."""
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ENOENT, "it is a symbolic link to what is not there") from None
        return "file"
    if _standard(info) is not None:
        return "standard"
    if stat.S_ISREG(info.st_mode):
        return "file"
    if stat.S_ISFIFO(info.st_mode) or (stat.S_ISCHR(info.st_mode) and info.st_rdev == os.stat(os.devnull).st_rdev):
        return "open"
    raise OSError(errno.EINVAL, "it is neither a file nor a pipe nor the null device")


def _standard(info: os.stat_result) -> int | None:
    """The descriptor through which this process prints to it already: what is printed is not to be lost by renaming."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), info):
                return descriptor
    return None


def _place(path: Path) -> Path:
    """Where the file itself is. It is opened first: the system then refuses links that another user put into a folder
    for all (/tmp); looking them up does not."""
    if not path.is_symlink():
        return path
    handle = os.open(path, _OLD)
    try:
        real = Path(os.path.realpath(path))
        if not os.path.samestat(os.fstat(handle), real.lstat()):
            raise OSError(errno.ELOOP, "it is a symbolic link that changes")
    finally:
        os.close(handle)
    return real


def _check_place(path: Path) -> None:
    """Raises OSError where `_replace` would."""
    if path.exists():
        os.close(os.open(path, _OLD))  # one that may only be read is not replaced either
        folder, mine = path.parent.stat(), getattr(os, "geteuid", lambda: 0)()
        if folder.st_mode & stat.S_ISVTX and mine not in (0, folder.st_uid, path.stat().st_uid):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    temporary = _temporary(path)
    os.close(os.open(temporary, _NEW, 0o600))
    temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".fastattn-{secrets.token_hex(8)}.tmp")


def _replace(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    handle = os.open(temporary, _NEW, 0o666)  # less the umask
    try:
        try:
            if path.exists() and os.name == "posix":
                old = path.stat()
                with suppress(OSError):  # written by root in a user's folder: it stays the user's
                    os.fchown(handle, old.st_uid, old.st_gid)
                os.fchmod(handle, old.st_mode & 0o777)
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _write_over(path, data)  # mounted by itself into a container: there is no beside
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the name as well; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_over(path: Path, data: bytes) -> None:
    handle = os.open(path, _OLD | getattr(os, "O_NOFOLLOW", 0))
    try:
        _write_all(handle, data)
        os.ftruncate(handle, len(data))
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_into(path: Path, data: bytes, kind: str) -> None:
    descriptor = _standard(path.stat()) if kind == "standard" else None
    if descriptor is not None:
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
        _write_all(descriptor, data)
        return
    handle = os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    try:
        _write_all(handle, data)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        if path.samefile(other):
            return True
    return os.path.realpath(path) == os.path.realpath(other)


def _part_of(path: Path, folder: Path) -> bool:
    """Whether a file is one of a directory that is read: of a model. Results that are kept there are not."""
    if not (path.exists() and folder.is_dir() and Path(os.path.realpath(path)).is_relative_to(folder.resolve())):
        return False
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return True
    return not (isinstance(found, dict) and {"benchmark", "environment"} <= set(found))
