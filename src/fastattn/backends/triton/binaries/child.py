"""The compiler's process: a program that compiles flag sets which it reads, and writes binaries.

It is started as a file, in Python's isolated mode (nothing is imported from the folder that it is started in, or for
the sake of a variable), and is told where the fastattn and the triton of the process that started it lie. It is a
program of its own, not a fork of a process that has used CUDA, and not `multiprocessing`'s, which runs a user's script
once more. It ends with the process that started it, whatever ends that one.

Frames: 8 bytes of length, then so many. Inward: first the settings, as JSON, then pickled flag sets. Outward, for each:
"+" and a packed binary, or "-" and why there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import queue
import select
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from importlib.machinery import ModuleSpec
from typing import Any

NICENESS = 10  #: what runs in the foreground goes first
_LOOK = 1.0  #: seconds between two looks at the process that started this one


def main() -> None:
    inward, outward = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what others print is no frame
    settings = json.loads(_frame(inward) or b"null")
    if settings is None:
        return
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    folder = tempfile.mkdtemp(prefix="fastattn-")
    tempfile.tempdir = os.environ["TMPDIR"] = folder  # what a process that is killed has left is found by its end
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "cache")  # others may write to the user's own
    threading.Thread(target=_listen, args=(inward, settings["parent"], requests, folder), daemon=True).start()
    try:
        for name, place in settings["packages"].items():
            _adopt(name, place)
        while True:
            answer = _answer(requests.get(), settings["version"])
            _write(outward, len(answer).to_bytes(8, "little") + answer)
            for name in os.listdir(folder):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    except BrokenPipeError:  # nobody listens any more
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        _end(folder)


def _answer(request: bytes, version: str) -> bytes:
    try:
        flags = pickle.loads(request)
        if version and sys.modules["triton"].__version__ != version:
            raise ImportError(f"triton is {sys.modules['triton'].__version__} here, expected {version}")
        return b"+" + flags.compile().packed()
    except MemoryError as error:
        return b"-out of memory: " + str(error).encode(errors="replace")
    except BaseException as error:  # a compiler's bug is one flag set's
        return f"-{type(error).__name__}: {error}".encode(errors="replace")


def _adopt(name: str, place: str) -> None:
    """Imports a package from its folder, whatever else has its name."""
    file = os.path.join(place, "__init__.py")
    spec: ModuleSpec | None = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[place])
    assert spec is not None and spec.loader is not None, file
    parent = os.path.dirname(place)
    if parent not in sys.path:
        sys.path.append(parent)  # for what it finds by its metadata
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _listen(inward: int, parent: int, requests: queue.SimpleQueue[bytes], folder: str) -> None:
    """Takes in requests. Ends the process, and the assembler that it may have started, when there can be no more.

    (A fork of the process that started this one may hold the pipe open.)
    """
    try:
        while os.getppid() == parent:
            if select.select([inward], [], [], _LOOK)[0]:
                request = _frame(inward)
                if request is None:
                    break
                requests.put(request)
    finally:
        _end(folder)


def _end(folder: str) -> None:
    sys.stderr.flush()
    shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _frame(inward: int) -> bytes | None:
    head = _read(inward, 8)
    return None if head is None else _read(inward, int.from_bytes(head, "little"))


def _read(inward: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(inward, count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _write(outward: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(outward, view) :]


if __name__ == "__main__":
    main()
