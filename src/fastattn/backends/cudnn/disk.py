"""Compiled plans on disk: loading one takes milliseconds, compiling its kernel 0.6 to 1.5 s.

A file is only ever used when it is whole, ours, and says of itself exactly what is looked for; anything else is skipped
with a debug line (logger "fastattn") and built anew. Nothing that is wrong with the disk raises.

    FASTATTN_PLAN_CACHE=DIR     where the files are; "off" or "0" for nowhere
                                default: $XDG_CACHE_HOME/fastattn/plans, ~/.cache/fastattn/plans
                                (%LOCALAPPDATA% on Windows)
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ..._compat import torch as torch_internals
from ...switches import OFF
from . import runtime
from .graphs import PlanKey

FORMAT = 2  #: of these files, and of what a key means; raise it when either changes
MAGIC = b"fastattn plan\n"
MAX_BYTES = 512 << 20  #: of all files together; the least recently used go first
MAX_FILE = 64 << 20  #: a plan is about 80 KB; what is larger is not one of ours

_log = logging.getLogger("fastattn")
_DIGEST = hashlib.sha256().digest_size


def directory() -> Path | None:
    """Where plans are kept, or None when they are not."""
    chosen = os.environ.get("FASTATTN_PLAN_CACHE", "")
    if chosen.lower() in OFF:
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    try:
        return Path(base) / "fastattn" / "plans" if base else Path.home() / ".cache" / "fastattn" / "plans"
    except RuntimeError:  # no home
        return None


def load(key: PlanKey) -> bytes | None:
    """The serialized plan of a key, or None."""
    folder = directory()
    if folder is None:
        return None
    label = _label(key)
    path = folder / _name(label)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE:
            raise ValueError("not a file of ours")
        if hasattr(os, "getuid") and (info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ValueError("another user owns it or may write to it")
        payload = _unpack(path.read_bytes(), label)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.debug("plan file %s skipped: %s", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    return payload


def store(key: PlanKey, payload: bytes) -> None:
    """Keeps a serialized plan. Another process sees the whole file or none of it."""
    folder = directory()
    if folder is None:
        return
    label = _label(key)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_pack(payload, label))
            os.replace(temporary, folder / _name(label))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _trim(folder)
    except OSError as error:
        _log.debug("plan not kept in %s: %s", folder, error)


def discard(key: PlanKey) -> None:
    """Removes the file of a key: cuDNN would not have it."""
    folder = directory()
    if folder is not None:
        with suppress(OSError):
            (folder / _name(_label(key))).unlink()


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
    return f"{hashlib.sha256(label).hexdigest()}.plan"


def _pack(payload: bytes, label: bytes) -> bytes:
    body = len(label).to_bytes(8, "little") + label + payload
    return MAGIC + hashlib.sha256(body).digest() + body


def _unpack(data: bytes, label: bytes) -> bytes:
    """The payload. Raises ValueError unless every byte is as it was written, for this label."""
    start = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or len(data) < start + 8:
        raise ValueError("not a plan, or cut short")
    body = data[start:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        raise ValueError("damaged")
    length = int.from_bytes(body[:8], "little")
    if body[8 : 8 + length] != label:
        raise ValueError("of another plan")
    return body[8 + length :]


def _trim(folder: Path) -> None:
    """Removes the least recently used files beyond MAX_BYTES, and what a killed process left half written."""
    files = []
    for entry in os.scandir(folder):
        with suppress(OSError):
            if entry.name.endswith((".plan", ".tmp")) and entry.is_file(follow_symlinks=False):
                info = entry.stat(follow_symlinks=False)
                files.append((info.st_mtime, info.st_size, entry.path))
    files.sort(reverse=True)
    newest = files[0][0] if files else 0.0
    total = 0
    for modified, size, path in files:
        total += size
        abandoned = path.endswith(".tmp") and newest - modified > 3600
        if total > MAX_BYTES or abandoned:
            with suppress(OSError):
                os.unlink(path)
