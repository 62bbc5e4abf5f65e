"""The compiler's own process: what it may import, that it compiles, and that it ends with the one that started it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in_compiler import Flags, command

from fastattn._compat.triton_compiler import environment
from fastattn.backends.triton.binaries.compilers import Compilers
from fastattn.backends.triton.binaries.flag_set import Binary
from fastattn.backends.triton.binaries.process import Child, CompileError, NoCompiler
from fastattn.backends.triton.binaries.triton_kernel import flags_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")

SRC = str(Path(__file__).parents[4] / "src")
COMBINE = SimpleNamespace(__module__="fastattn.backends.triton.decode.combine", __name__="combine_kernel")
SMALL = flags_of(
    COMBINE, (9, 0), [("float32", True), ("bfloat16", True), None, None], [1, 4], [], [8, 4, 64, 64, 64, 64, True],
    {"num_warps": 4},
)  # fmt: skip
#: Starts a compiler, says which process it is, and then does what is appended.
PROGRAM = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from stand_in_compiler import Flags, command
from fastattn.backends.triton.binaries.process import Child
child = Child({start})
"""


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def group(number: int) -> list[str]:
    """The names of the processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().partition(" (")[2].rpartition(") ")
            state, _, owner, *_ = rest.split()
            if int(owner) == number and state != "Z":
                found.append(name)
    return found


def end_of(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def program(start: str, rest: str, **variables: str) -> subprocess.Popen[str]:
    text = PROGRAM.format(paths=[str(Path(__file__).parents[3] / "helpers"), SRC], start=start) + rest
    environment = os.environ | variables
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_kernel_is_compiled_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler, which takes nothing from where it is started, nor from variables."""
    pytest.importorskip("triton")
    for name in ("triton", "torch", "fastattn", "json", "pickle", "random"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('a stranger: {name}')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    child = Child()
    binary = child.compile(SMALL)
    assert binary.name == "combine_kernel" and binary.threads == 128
    assert binary.cubin[:4] == b"\x7fELF" and int.from_bytes(binary.cubin[18:20], "little") == 190  # EM_CUDA
    process = child._process
    assert process is not None
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert os.getpgid(process.pid) == process.pid  # Ctrl-C does not reach it
    with pytest.raises(CompileError, match="arguments"):
        child.compile(flags_of(COMBINE, (9, 0), [], [1, 4], [], [], {}))
    child.end()
    assert not alive(process.pid)
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_it_ends_with_a_parent_that_is_killed(seconds: float, tmp_path: Path) -> None:
    """In the middle of its work: in the compiler, or in the assembler that it has started."""
    pytest.importorskip("triton")
    rest = f"""
import threading
from fastattn.backends.triton.hopper.binary import BAND, Flags
def report():
    while child._process is None: time.sleep(0.01)
    time.sleep({seconds})
    print(child._process.pid, flush=True)
threading.Thread(target=report).start()
child.compile(Flags("bf16", (128, 128), BAND, kv_lengths=True, softcap=True, lse=True))
print("too late", flush=True)
time.sleep(60)
"""
    parent = program("", rest, TMPDIR=str(tmp_path))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid) and list(tmp_path.iterdir())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert end_of(pid, 10.0)
    assert not parent.stdout.read()
    assert group(pid) == [] and not list(tmp_path.iterdir())
    parent.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_an_idle_one_ends_with_its_parent(tmp_path: Path, how: signal.Signals | None) -> None:
    rest = "child.compile(Flags()); print(child._process.pid, flush=True)\n"
    parent = program(f"command(Path({str(tmp_path / 'log')!r}))", rest + ("time.sleep(60)" if how else ""))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if how:
        parent.send_signal(how)
    parent.wait()
    assert end_of(pid, 10.0)
    parent.stdout.close()


@pytest.mark.slow
def test_it_ends_although_a_fork_of_its_parent_holds_the_pipe(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rest = f"""
import pickle, os, ctypes
child.compile(pickle.loads({pickle.dumps(SMALL)!r}))
if not ctypes.CDLL(None).fork():  # one that Python does not know of
    time.sleep(8); os._exit(0)
print(child._process.pid, flush=True)
time.sleep(60)
"""
    parent = program("", rest)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert end_of(pid, 5.0)
    parent.stdout.close()


def test_no_answer_in_time(tmp_path: Path) -> None:
    child = Child(command(tmp_path / "log"), timeout=0.5)
    with pytest.raises(NoCompiler, match=r"no answer within 0 s|no answer within"):
        child.compile(Flags("slow 60"))
    assert child.compile(Flags()).threads == 128
    child.end()


def test_last_words_are_told(tmp_path: Path) -> None:
    child = Child(command(tmp_path / "log"))
    assert child.compile(Flags("good", 3)).name == "kernel_3"
    with pytest.raises(NoCompiler, match="status -9: LLVM ERROR: oh no"):
        child.compile(Flags("crash"))
    child.end()


def test_variables_of_the_compiler_are_left_out() -> None:
    found = environment(
        {"TRITON_INTERPRET": "1", "DISABLE_PTXAS_OPT": "1", "MLIR_ENABLE_DUMP": "1", "PTXAS_OPTIONS": "-O0",
         "TRITON_PTXAS_PATH": "/x", "PATH": "/bin", "LD_LIBRARY_PATH": "/y", "CUDA_HOME": "/z"}
    )  # fmt: skip
    assert {"TRITON_PTXAS_PATH", "PATH", "LD_LIBRARY_PATH", "CUDA_HOME"} < set(found)
    assert not {"TRITON_INTERPRET", "DISABLE_PTXAS_OPT", "MLIR_ENABLE_DUMP", "PTXAS_OPTIONS"} & set(found)


def test_a_binary_survives_packing() -> None:
    binary = Binary(b"\x7fELF\n\x00{}\n", "name", 5, 128)
    assert Binary.unpacked(binary.packed()) == binary
    for wrong in (b"", b"{}", b"[]\n\x7fELF", b'{"name": 1, "shared": 1, "threads": 1}\n\x7fELF', binary.packed()[:-9]):
        with pytest.raises(ValueError):
            Binary.unpacked(wrong)


def test_there_are_no_more_processes_than_may_be(tmp_path: Path) -> None:
    pool, most, now, lock = Compilers(command(tmp_path / "log"), most=2), 0, 0, threading.Lock()

    def task(compile: object) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1

    tasks = [lambda compile, i=i: task(compile) for i in range(8)]
    for each in tasks:
        assert pool.submit(each)
    assert pool.wait(10.0) and most == 2
    pool.stop()
    assert not pool.submit(tasks[0])
