"""Compiled plans on disk: loading one takes milliseconds, compiling its kernel 0.6 to 1.5 s.

A file is only ever used when it is whole, was written by this user in this folder (`folder.py`), and says of itself
exactly what is looked for; anything else is skipped with a debug line (logger "fastattn") and built anew. Nothing that
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
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from ..._compat import torch as torch_internals
from ...common.notice import warn_once
from ...config import OFF
from . import folder as folders
from . import runtime
from .graphs import PlanKey

FORMAT = 3  #: of these files, and of what a key means; raise it when either changes
MAGIC = b"fastattn plan\n"
MAX_BYTES = 512 << 20  #: of all files together; the least recently used go first
MAX_FILE = 64 << 20  #: a plan is about 80 KB; what is larger is not one of ours

_log = logging.getLogger("fastattn")
_DIGEST = sha256().digest_size
#: What `store` makes, and what it leaves behind when it is killed. No other file is ever removed.
_OURS = re.compile(rf"[0-9a-f]{{64}}\.plan|(?:[0-9a-f]{{64}}\.plan|{re.escape(folders.KEY)})\.[0-9a-f]{{16}}\.tmp")


def directory() -> Path | None:
    """Where plans are kept, or None when they are not."""
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
    """Why plans are not kept in `directory()` although they should be, or None."""
    path = directory()
    try:
        if path is not None:
            with folders.opened(path):
                pass
    except FileNotFoundError:
        return None  # it is made with the first plan
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load(key: PlanKey) -> bytes | None:
    """The serialized plan of a key, or None."""
    path = directory()
    if path is None:
        return None
    label = _label(key)
    name = _name(label)
    try:
        with folders.opened(path) as folder, folders.file(folder, name, MAX_FILE) as handle:
            payload = _unpack(folders.read(handle, MAX_FILE + 1), label, folders.key(folder))
            with suppress(OSError):
                os.utime(handle)  # used now
        return payload
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.debug("plan file %s skipped: %s", path / name, error)
        return None


def store(key: PlanKey, payload: bytes) -> None:
    """Keeps a serialized plan. Another process sees the whole file or none of it."""
    path = directory()
    if path is None:
        return
    label = _label(key)
    try:
        with folders.opened(path, create=True) as folder:
            data = _pack(payload, label, folders.make_key(folder))
            folders.write(folder, _name(label), lambda handle: data)
            _trim(folder)
    except (OSError, ValueError) as error:
        _log.debug("plan not kept in %s: %s", path, error)


def discard(key: PlanKey) -> None:
    """Removes the file of a key: cuDNN would not have it."""
    path = directory()
    if path is not None:
        with suppress(OSError, ValueError), folders.opened(path) as folder:
            os.unlink(_name(_label(key)), dir_fd=folder)


def _label(key: PlanKey) -> bytes:
    """Everything that can make a plan invalid, as text: it names the file and stands in it."""
    return f"{_environment(key.device)}\n{key!r}".encode()


@cache
def _environment(device: int) -> str:
    library = runtime.frontend()
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "format": FORMAT,
        "frontend": getattr(library.cudnn, "__version__", None),
        "cudnn": library.version,
        "cuda": torch.version.cuda,
        "driver": torch_internals.driver_version(),
        "device": (properties.name, properties.major, properties.minor, properties.multi_processor_count),
        "memory": properties.total_memory,
    }
    return repr(facts)


def _name(label: bytes) -> str:
    return f"{sha256(label).hexdigest()}.plan"


def _pack(payload: bytes, label: bytes, key: bytes) -> bytes:
    body = len(label).to_bytes(8, "little") + label + payload
    return MAGIC + hmac.digest(key, body, "sha256") + body


def _unpack(data: bytes, label: bytes, key: bytes) -> bytes:
    """The payload. Raises ValueError unless every byte is as it was written, with this key, for this label."""
    start = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or len(data) < start + 8:
        raise ValueError("not a plan, or cut short")
    body = data[start:]
    if not hmac.compare_digest(hmac.digest(key, body, "sha256"), data[len(MAGIC) : start]):
        raise ValueError("damaged, or written by somebody else")
    length = int.from_bytes(body[:8], "little")
    if body[8 : 8 + length] != label:
        raise ValueError("of another plan")
    return body[8 + length :]


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
        abandoned = name.endswith(".tmp") and newest - modified > 3600
        if total > MAX_BYTES or abandoned:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
