"""A folder that nobody but this user can have filled, held by a descriptor: what was checked is what is used.

A plan from disk is handed to cuDNN, a kernel to the driver, and both believe it, so that whoever can write one runs
code here. Three things stand in the way. The folder belongs to the user who runs (the effective one: root in somebody's
home trusts nothing there), and nobody else may write to it or exchange what leads to it. The files in it are regular,
the user's, and nobody else's to write. And each carries a code (HMAC) made with a key that is in the folder, for the
user's eyes only, and knows which file it is: a folder that was unpacked from an archive, or copied, has another inode,
and so no key and no plans.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEY = "fastattn.key"
_MAGIC = b"fastattn key\n"
_SECRET = 32  #: bytes
_KEY_SIZE = len(_MAGIC) + 8 + _SECRET
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  #: in one path, as Linux has it

# O_PATH needs no permission to list what leads to the folder. O_NONBLOCK: to open a pipe would wait for ever.
_LEAD = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
#: Without these (Windows) nothing can be said of a folder, and none is used.
_ABLE = hasattr(os, "geteuid") and hasattr(os, "O_NOFOLLOW") and os.open in os.supports_dir_fd


@contextmanager
def opened(path: Path, create: bool = False) -> Iterator[int]:
    """The folder's descriptor. create: makes what is missing of the path, for the user alone.

    Raises OSError where there is none, and ValueError where it is not the user's alone.
    """
    folder = _walk(path, create)
    try:
        yield folder
    finally:
        os.close(folder)


def _walk(path: Path, create: bool) -> int:
    """Opens one part of an absolute path after another, from the last one's descriptor, and checks each."""
    if not _ABLE:
        raise ValueError("this system does not say whose a folder is")
    if not path.is_absolute():
        raise ValueError(f"{path} is relative")
    left = list(reversed(path.parts[1:]))
    here, links = os.open(path.anchor, _LEAD), 0
    try:
        while left:
            _check_lead(os.fstat(here), path)
            name = left.pop()
            try:
                there = _enter(here, name, create)
            except OSError:
                links += 1
                target = _link(here, name, path)
                if target is None or links > _MOST_LINKS:
                    raise
                left += reversed([part for part in target.split("/") if part])
                there = os.open("/" if target.startswith("/") else ".", _LEAD, dir_fd=here)
            os.close(here)
            here = there
        info = os.fstat(here)
        if info.st_uid != os.geteuid() or info.st_mode & _OTHERS_WRITE:
            raise ValueError(f"{path}: another user owns it or may write to it")
        return here
    except BaseException:
        os.close(here)
        raise


def _enter(here: int, name: str, create: bool) -> int:
    try:
        return os.open(name, _LEAD, dir_fd=here)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):  # another process made it
        os.mkdir(name, 0o700, dir_fd=here)
    return os.open(name, _LEAD, dir_fd=here)


def _link(here: int, name: str, path: Path) -> str | None:
    """Where a symbolic link leads, None when it is none. Somebody else's could be turned elsewhere."""
    info = os.stat(name, dir_fd=here, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        return None
    _check_owner(info, path)
    return os.readlink(name, dir_fd=here)


def _check_owner(info: os.stat_result, path: Path) -> None:
    # Whoever owns the root folder owns all. (That is not 0 in a user namespace to which root is not mapped.)
    if info.st_uid not in (0, os.geteuid(), os.stat("/").st_uid):
        raise ValueError(f"{path}: another user owns what leads to it")


def _check_lead(info: os.stat_result, path: Path) -> None:
    """A group may write on the way, as where a user's own group comes with a umask of 002: its members can exchange the
    folder for another one of the user's, but not put anything into that."""
    _check_owner(info, path)
    if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        raise ValueError(f"{path}: anybody may exchange what leads to it")


@contextmanager
def file(folder: int, name: str, most: int, mode: int = _OTHERS_WRITE, links: int = 1) -> Iterator[int]:
    """The descriptor of a regular file of the user's in the folder, of at most so many bytes.

    mode: permissions that it must not give; links: names that it may have. Raises OSError where there is none, and
    ValueError for anything else.
    """
    handle = os.open(name, _READ, dir_fd=folder)
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most or info.st_nlink > links:
            raise ValueError("not a file of ours")
        if info.st_uid != os.geteuid() or info.st_mode & mode:
            raise ValueError("another user owns it or may write to it")
        yield handle
    finally:
        os.close(handle)


def read(handle: int, most: int) -> bytes:
    """All bytes of an open file, at most so many."""
    parts = []
    while most > 0 and (part := os.read(handle, most)):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def write(folder: int, name: str, content: Callable[[int], bytes], replace: bool = True) -> None:
    """Makes a file for the user alone: others see the whole of it or nothing.

    content: its bytes, from its descriptor. replace=False: FileExistsError where it is there already. Raises OSError,
    leaving nothing behind.
    """
    temporary = f"{name}.{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, _WRITE, 0o600, dir_fd=folder)
    try:
        try:
            out = os.fdopen(handle, "wb")
        except BaseException:
            os.close(handle)
            raise
        with out:
            out.write(content(handle))
        if replace:
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            return
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.unlink(temporary, dir_fd=folder)


def key(folder: int) -> bytes:
    """The folder's key. Raises OSError where there is none, and ValueError when it is not what was made here."""
    with file(folder, KEY, _KEY_SIZE, mode=0o077, links=2) as handle:  # it has two names while it is made
        found = read(handle, _KEY_SIZE + 1)
        if len(found) != _KEY_SIZE or found[:-_SECRET] != _about(handle):
            raise ValueError("the folder was copied, or its key is damaged")
        return found[-_SECRET:]


def make_key(folder: int) -> bytes:
    """The folder's key; a new one where none holds, under which nothing that was kept before is found."""
    try:
        return key(folder)
    except FileNotFoundError:
        replace = False  # of processes that start together one makes it, and all use it
    except ValueError:
        replace = True

    def content(handle: int) -> bytes:
        return _about(handle) + secrets.token_bytes(_SECRET)

    try:
        write(folder, KEY, content, replace)
    except FileExistsError:
        pass
    except OSError:
        if replace:
            raise
        write(folder, KEY, content)  # a file system without hard links
    return key(folder)


def _about(handle: int) -> bytes:
    return _MAGIC + os.fstat(handle).st_ino.to_bytes(8, "little")
