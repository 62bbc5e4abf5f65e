"""What was compiled, kept on disk for later processes: cuDNN's plans, binaries of our own kernels, the native module of
`dispatch/native`, in one folder.

A file is only ever used when it is whole, was written by this user in this folder (`folder.py`), and says of itself
exactly what is looked for; anything else is skipped with a debug line (logger "fastattn") and made anew. Nothing that
is wrong with the disk raises.

    FASTATTN_PLAN_CACHE=DIR     where the files are: an absolute path, or one that starts with ~; "off" or "0" for
                                nowhere. A relative one would be another folder, maybe a stranger's, in each directory
                                that a program is started in: it is refused with a warning.
                                default: $XDG_CACHE_HOME/fastattn/plans where that is absolute, as its specification
                                wants it, else ~/.cache/fastattn/plans
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..config import OFF
from . import folder as folders
from .notice import warn_once

try:
    import fcntl
except ImportError:  # Windows, where nothing is kept
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 512 << 20  #: of all files together; the least recently used go first
POLL = 0.2  #: seconds between two looks for what another process makes

_log = logging.getLogger("fastattn")
_DIGEST = sha256().digest_size
#: What `store` and `claimed` make, and what `store` leaves behind when it is killed. No other file is ever removed.
_OURS = re.compile(
    rf"[0-9a-f]{{64}}\.(?:plan|kernel|module|lock)|(?:[0-9a-f]{{64}}\.(?:plan|kernel|module)|{re.escape(folders.KEY)})"
    r"\.[0-9a-f]{16}\.tmp"
)


def directory() -> Path | None:
    """Where files are kept, or None when they are not."""
    chosen = os.environ.get("FASTATTN_PLAN_CACHE", "")
    if chosen.lower() in OFF:
        return None
    if chosen:
        path = Path(os.path.expanduser(chosen))  # ("~nobody" stays as it is)
        if path.is_absolute():
            return path
        warn_once(
            f"FASTATTN_PLAN_CACHE: expected an absolute path, one that starts with ~, or off, got {chosen!r}: "
            "no plan is kept on disk"
        )
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "fastattn" / "plans"
    try:
        home = Path.home()
    except RuntimeError:  # no home
        return None
    return home / ".cache" / "fastattn" / "plans" if home.is_absolute() else None


def refusal() -> str | None:
    """Why nothing is kept in `directory()` although it should be, or None."""
    path = directory()
    try:
        if path is not None:
            with folders.opened(path):
                pass
    except FileNotFoundError:
        return None  # it is made with the first file
    except (OSError, ValueError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Files:
    """Files of one kind. A label is everything that can make one invalid, as text: it names the file and stands in
    it."""

    kind: str  #: "plan", "kernel", "module": what the files' names end in
    max_file: int  #: bytes; what is larger is not one of ours

    @property
    def magic(self) -> bytes:
        return f"fastattn {self.kind}\n".encode()

    def name(self, label: bytes) -> str:
        return f"{sha256(label).hexdigest()}.{self.kind}"

    def load(self, label: bytes) -> bytes | None:
        """What was stored under a label, or None."""
        path = directory()
        if path is None:
            return None
        name = self.name(label)
        try:
            with folders.opened(path) as folder, folders.file(folder, name, self.max_file) as handle:
                payload = self.unpack(folders.read(handle, self.max_file + 1), label, folders.key(folder))
                with suppress(OSError):
                    os.utime(handle)  # used now
            return payload
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.debug("%s file %s skipped: %s", self.kind, path / name, error)
            return None

    def store(self, label: bytes, payload: bytes) -> None:
        """Keeps a payload. Another process sees the whole file or none of it."""
        path = directory()
        if path is None:
            return
        try:
            with folders.opened(path, create=True) as folder:
                data = self.pack(payload, label, folders.make_key(folder))
                folders.write(folder, self.name(label), lambda handle: data)
                _trim(folder)
        except (OSError, ValueError) as error:
            _log.debug("%s not kept in %s: %s", self.kind, path, error)

    def discard(self, label: bytes) -> None:
        """Removes the file of a label: who uses it would not have it."""
        path = directory()
        if path is not None:
            with suppress(OSError, ValueError), folders.opened(path) as folder:
                os.unlink(self.name(label), dir_fd=folder)

    def pack(self, payload: bytes, label: bytes, key: bytes) -> bytes:
        body = len(label).to_bytes(8, "little") + label + payload
        return self.magic + hmac.digest(key, body, "sha256") + body

    def unpack(self, data: bytes, label: bytes, key: bytes) -> bytes:
        """The payload. Raises ValueError unless every byte is as it was written, with this key, for this label."""
        start = len(self.magic) + _DIGEST
        if not data.startswith(self.magic) or len(data) < start + 8:
            raise ValueError(f"not a {self.kind}, or cut short")
        body = data[start:]
        if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[len(self.magic) : start]):
            raise ValueError("damaged, or written by somebody else")
        length = int.from_bytes(body[:8], "little")
        if body[8 : 8 + length] != label:
            raise ValueError(f"of another {self.kind}")
        return body[8 + length :]

    @contextmanager
    def claimed(self, label: bytes, stop: Callable[[], bool] = lambda: False, timeout: float = 60.0) -> Iterator[None]:
        """Within the block no other process of the user makes what the label names, if all make it in such a block.

        Waits for another one's, looking `stop` up now and then, at most so many seconds: then two make it, which costs
        time and nothing else. A process that ends gives its claim up. Without a folder there are no claims.
        """
        claim = _claim(self.name(label))
        try:
            end = time.monotonic() + timeout
            while claim is not None and not _held(claim) and not stop() and time.monotonic() < end:
                time.sleep(POLL)
            yield
        finally:
            if claim is not None:
                with suppress(OSError):  # not by closing alone: a forked child has the file open too
                    fcntl.flock(claim, fcntl.LOCK_UN)
                os.close(claim)


def _claim(name: str) -> int | None:
    """The file whose lock is the claim, which outlives it: to remove it would give two processes two files."""
    path = directory()
    if path is None or fcntl is None:
        return None
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with folders.opened(path, create=True) as folder:
            return os.open(f"{name.partition('.')[0]}.lock", flags, 0o600, dir_fd=folder)
    except (OSError, ValueError) as error:
        _log.debug("nothing is claimed in %s: %s", path, error)
        return None


def _held(claim: int) -> bool:
    """Takes the lock. True where there are none, as on some networks' file systems."""
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _trim(folder: int) -> None:
    """Removes the least recently used files beyond MAX_BYTES, and what a killed process left half written."""
    files = []
    listed = os.open(".", os.O_RDONLY, dir_fd=folder)
    try:
        with os.scandir(listed) as entries:
            for entry in entries:
                with suppress(OSError):
                    info = entry.stat(follow_symlinks=False) if _OURS.fullmatch(entry.name) else None
                    if info and stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
                        files.append((info.st_mtime, info.st_size, entry.name))
    finally:
        os.close(listed)
    files.sort(reverse=True)
    newest = files[0][0] if files else 0.0
    total = 0
    for modified, size, name in files:
        total += size
        abandoned = name.endswith((".tmp", ".lock")) and newest - modified > 3600
        if total > MAX_BYTES or abandoned:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
