"""What stands for the compiler: flag sets that say how it behaves, a program that behaves so, and a CUDA driver.

    python stand_in_compiler.py LOG

The program speaks as `binaries/child.py` does, without fastattn or triton, and writes a line of LOG for each flag set.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Flags:
    """how: a word for what the compiler does, and what the word needs after a space."""

    how: str = "good"
    number: int = 0

    @property
    def capability(self) -> tuple[int, int]:
        return 9, 0

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def compile(self) -> Any:
        raise AssertionError("only another process compiles")


def cubin(flags: Flags) -> bytes:
    return b"\x7fELF" + repr(flags).encode() * 50


def answer(flags: Flags) -> bytes:
    word, _, rest = flags.how.partition(" ")
    if word == "slow":
        time.sleep(float(rest or 0.5))
    if word == "until":
        while not Path(rest).exists():
            time.sleep(0.01)
    if word == "wrong":
        return b"-ValueError: the compiler does not like it"
    if word == "memory":
        return b"-out of memory: "
    if word == "crash" or (word == "once" and not Path(rest).exists()):
        if word == "once":
            Path(rest).touch()
        print("LLVM ERROR: oh no", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "garbage":
        return b"+{}\nno machine code"
    if word == "short":
        os.write(1, (100).to_bytes(8, "little") + b"+{")
        os._exit(3)
    if word == "exit":
        os._exit(0)
    head = {"name": f"kernel_{flags.number}", "shared": 1000 + flags.number, "threads": 128}
    return b"+" + json.dumps(head).encode() + b"\n" + cubin(flags)


def serve(log: str) -> None:
    inward = sys.stdin.buffer
    settings = json.loads(inward.read(int.from_bytes(inward.read(8), "little")))
    assert settings["parent"] == os.getppid() and "fastattn" in settings["packages"]
    while head := inward.read(8):
        flags = pickle.loads(inward.read(int.from_bytes(head, "little")))
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {flags!r}\n")
        data = answer(flags)
        os.write(1, len(data).to_bytes(8, "little") + data)


def command(log: Path) -> Callable[[], list[str]]:
    """Starts the program: for `Compilers`."""
    return lambda: [sys.executable, __file__, str(log)]


def compiled(log: Path) -> list[str]:
    """What was compiled, in words."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [line.partition(" ")[2] for line in lines]


def processes(log: Path) -> list[int]:
    """That have compiled something."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return list(dict.fromkeys(int(line.partition(" ")[0]) for line in lines))


class Driver:
    """A CUDA driver without a GPU: it knows what was loaded and launched.

    refuse: the status of loading a module.
    """

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.launched: list[dict[str, Any]] = []
        self.refuse = 0

    def cuModuleLoadData(self, module: Any, data: bytes) -> int:
        self.loaded.append(data)
        return self.refuse

    def cuModuleGetFunction(self, handle: Any, module: Any, name: bytes) -> int:
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 4096 + len(self.loaded)
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"a reason"
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *dims, shared, stream, arguments, _ = rest
        self.launched.append(
            {"grid": tuple(dims[:3]), "block": tuple(dims[3:]), "shared": shared, "stream": stream.value,
             "arguments": arguments, "attributes": []}
        )  # fmt: skip
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, _: Any) -> int:
        c = config._obj
        attributes = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.count)]
        self.launched.append(
            {"grid": tuple(c.grid), "block": tuple(c.block), "shared": c.shared, "stream": c.stream,
             "arguments": arguments, "attributes": attributes}
        )  # fmt: skip
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 0


if __name__ == "__main__":
    sys.modules["stand_in_compiler"] = sys.modules["__main__"]
    serve(sys.argv[1])
