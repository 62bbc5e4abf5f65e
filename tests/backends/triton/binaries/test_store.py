"""Which binaries there are, and that nobody waits for one who did not ask to."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_compiler import Driver, Flags, command, compiled, cubin, processes

from fastattn.backends.base import NotReady, Refusal, Setback
from fastattn.backends.triton import cuda_driver
from fastattn.backends.triton.binaries import policy
from fastattn.backends.triton.binaries import store as module
from fastattn.backends.triton.binaries.compilers import Compilers
from fastattn.backends.triton.binaries.label import FILES, label
from fastattn.backends.triton.binaries.policy import mode, waiting
from fastattn.backends.triton.binaries.store import TRIES, Binaries
from fastattn.backends.triton.cuda_driver import BoundLaunch
from fastattn.shape_cache import Reason, shape_cache


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "kept"))
    for name in ("FASTATTN_COMPILE", "FASTATTN_UNTESTED_TRITON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested=""))
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: found)
    return found


@pytest.fixture
def binaries(log: Path, clock: Clock) -> Iterator[Binaries]:
    found = Binaries(Compilers(command(log), most=2), clock)
    yield found
    found.compilers.stop()


def another(log: Path) -> Binaries:
    """As another process would have it."""
    return Binaries(Compilers(command(log), most=1))


def test_asking_does_not_wait_and_is_done_once(binaries: Binaries, log: Path, tmp_path: Path, driver: Driver) -> None:
    go = tmp_path / "go"
    flags = Flags(f"until {go}", 7)
    assert binaries.ready(flags) is None
    start = time.monotonic()
    for _ in range(5):
        assert binaries.ask(flags, device=0) is None
    assert time.monotonic() - start < 2.0
    why, coming, _ = binaries.state(flags)
    assert "is being compiled" in why and coming
    assert binaries.stats()["background_compiles"] == 0
    go.touch()
    assert binaries.wait(20.0)
    function = binaries.ready(flags)
    assert function is not None and binaries.ask(flags) is function
    assert compiled(log) == [repr(flags)]
    assert driver.loaded == [cubin(flags)]  # before it was published: no launch has to
    stats = binaries.stats()
    assert (stats["binaries"], stats["background_compiles"], stats["compiles"], stats["failures"]) == (1, 1, 0, 0)
    assert stats["background_compile_ms"] > 0
    BoundLaunch(function, (3, 1, 1), 0, (ctypes.c_void_p * 1)(), None)(5)
    launched = driver.launched[0]
    assert (launched["grid"], launched["block"], launched["shared"]) == ((3, 1, 1), (128, 1, 1), 1007)
    assert launched["stream"] == 5


def test_what_a_call_is_told(binaries: Binaries, tmp_path: Path) -> None:
    flags = Flags(f"until {tmp_path / 'go'}")
    with pytest.raises(NotReady, match="being compiled") as caught:
        binaries.function(flags)
    assert caught.value.coming
    before = shape_cache.drops(Reason.BINARY_READY)
    (tmp_path / "go").touch()
    assert binaries.wait(20.0)
    assert shape_cache.drops(Reason.BINARY_READY) == before + 1
    assert binaries.function(flags) is binaries.ready(flags)


@pytest.mark.parametrize("how", ["variable", "block", "deterministic", "captured"])
def test_a_call_that_is_to_wait_waits(binaries: Binaries, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    assert mode() == "background"
    if how == "variable":
        monkeypatch.setenv("FASTATTN_COMPILE", "wait")
        assert binaries.function(Flags()) is not None
    elif how == "block":
        with waiting():
            assert binaries.function(Flags()) is not None
        assert mode() == "background"
    elif how == "captured":
        for name in ("is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        assert binaries.function(Flags()) is not None
    else:
        torch.use_deterministic_algorithms(True)
        try:
            assert binaries.function(Flags()) is not None
        finally:
            torch.use_deterministic_algorithms(False)
    stats = binaries.stats()
    assert (stats["compiles"], stats["background_compiles"]) == (1, 0)


def test_one_who_waits_goes_first(binaries: Binaries, log: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    for number in range(2):  # both processes have something to do
        binaries.ask(Flags(f"until {go}", number))
    later = [Flags("good", number) for number in range(10, 14)]
    for flags in later:
        binaries.ask(flags)
    waited = threading.Thread(target=binaries.make, args=(later[-1],))
    waited.start()
    time.sleep(0.2)
    go.touch()
    waited.join(20.0)
    assert binaries.wait(20.0)
    order = [line for line in compiled(log) if "until" not in line]
    assert order.index(repr(later[-1])) <= 1 and len(order) == len(set(order)) == 4


def test_many_at_once(binaries: Binaries, log: Path) -> None:
    every = [Flags("slow 0.05", number) for number in range(6)]
    binaries.make(every[0])
    found = dict(binaries.make_all([*every, *every, Flags("wrong")]))
    assert found == {**dict.fromkeys(every[1:], ""), Flags("wrong"): "ValueError: the compiler does not like it"}
    assert all(binaries.ready(flags) for flags in every)
    assert len(compiled(log)) == 7


def test_many_threads_make_one(binaries: Binaries, log: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(binaries.make(Flags("slow 0.2")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert len(found) == 8 and len(set(map(id, found))) == 1 and len(compiled(log)) == 1


def test_a_module_is_loaded_although_a_graph_is_captured(binaries: Binaries, driver: Driver) -> None:
    modes = [0]  # of this thread: "global"

    def exchange(mode: Any) -> int:
        modes.append(mode._obj.value)
        mode._obj.value = modes[-2]
        return 0

    def load(module: Any, data: bytes) -> int:
        assert modes[-1] == 2
        return 0

    driver.cuThreadExchangeStreamCaptureMode, driver.cuModuleLoadData = exchange, load  # type: ignore[method-assign]
    binaries.make(Flags()).load(0)
    assert modes == [0, 2, 0]


# What goes wrong.


def test_what_the_compiler_refuses_is_refused_for_good(binaries: Binaries, log: Path, clock: Clock) -> None:
    flags = Flags("wrong")
    for _ in range(2):
        with pytest.raises(Refusal, match="does not like it") as caught:
            binaries.make(flags)
        assert not isinstance(caught.value, (Setback, NotReady))
    clock.now += 1e6
    with pytest.raises(Refusal, match="does not like it"):
        binaries.function(flags)
    assert binaries.failed(flags) and compiled(log) == [repr(flags)]
    assert binaries.stats()["failures"] == 1
    assert binaries.make(Flags("good")) is not None


@pytest.mark.parametrize("how", ["crash", "garbage", "short", "exit", "memory"])
def test_a_compiler_that_dies_is_tried_again_later_and_not_for_ever(
    binaries: Binaries, log: Path, clock: Clock, how: str
) -> None:
    flags = Flags(how)
    for attempt in range(1, TRIES + 1):
        with pytest.raises(NotReady) as told:
            binaries.function(flags)
        assert told.value.coming
        assert binaries.wait(20.0)
        assert len(compiled(log)) == attempt
        if attempt == TRIES:
            break
        with pytest.raises(NotReady, match="will be tried again") as caught:
            binaries.function(flags)
        assert not caught.value.coming and caught.value.until > time.monotonic()
        assert len(compiled(log)) == attempt
        clock.now += 1e4
    with pytest.raises(Refusal) as refused:
        binaries.function(flags)
    assert not isinstance(refused.value, NotReady)
    assert binaries.make(Flags("good")) is not None  # another process


def test_a_crash_says_what_the_compiler_said(binaries: Binaries, tmp_path: Path) -> None:
    flags = Flags(f"once {tmp_path / 'there'}")
    with pytest.raises(Setback, match="status -9: LLVM ERROR: oh no"):
        binaries.make(flags)
    assert binaries.make(flags) is not None  # who waits need not wait for the clock
    assert binaries.failed(flags) is None


def test_a_compiler_that_does_not_start(clock: Clock) -> None:
    binaries = Binaries(Compilers(lambda: ["/nowhere/python"], most=1), clock)
    with pytest.raises(Setback, match="nowhere"):
        binaries.make(Flags())
    binaries.compilers.stop()


def test_a_system_without_threads(clock: Clock, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    binaries = Binaries(Compilers(command(log)), clock)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert binaries.ask(Flags()) is None
        with pytest.raises(Setback, match="no thread or no process"):
            binaries.make(Flags())
    assert binaries.wait(1.0) and compiled(log) == []
    assert binaries.make(Flags()) is not None
    binaries.compilers.stop()


def test_a_flag_set_that_cannot_be_sent(binaries: Binaries) -> None:
    @dataclass(frozen=True)
    class Local(Flags):
        pass

    with pytest.raises(Refusal, match=r"(?i)pickle"):
        binaries.make(Local())
    assert binaries.make(Flags()) is not None


def test_a_driver_that_does_not_take_it(binaries: Binaries, driver: Driver, folder: Path) -> None:
    driver.refuse = 209
    with pytest.raises(Refusal, match="loading a kernel: a reason"):
        binaries.make(Flags(), device=0)
    assert binaries.ready(Flags()) is None
    assert not list(folder.glob("*.kernel"))  # what no driver has loaded is not kept


def test_after_the_end_nothing_is_compiled(binaries: Binaries, log: Path) -> None:
    binaries.ask(Flags("slow 30"))
    while not compiled(log):
        time.sleep(0.01)
    start = time.monotonic()
    binaries.compilers.stop()
    assert time.monotonic() - start < 8.0
    assert binaries.ask(Flags("good")) is None and binaries.ready(Flags("good")) is None


# Who may compile.


def test_off(binaries: Binaries, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another(log).make(Flags("good", 1))
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    assert binaries.function(Flags("good", 1)) is not None  # from the disk
    with pytest.raises(NotReady, match="FASTATTN_COMPILE=off") as caught:
        binaries.function(Flags())
    assert not caught.value.coming
    with pytest.raises(Refusal, match="FASTATTN_COMPILE=off"):
        binaries.make(Flags())
    assert dict(binaries.make_all([Flags()])) == {Flags(): "FASTATTN_COMPILE=off"}
    assert len(compiled(log)) == 1
    monkeypatch.setenv("FASTATTN_COMPILE", "maybe")
    with pytest.raises(ValueError, match="FASTATTN_COMPILE"):
        binaries.function(Flags())


def test_a_triton_that_was_not_tested_does_not_compile(binaries: Binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "compiler", lambda: SimpleNamespace(untested="Triton 9.9 was not tested"))
    with pytest.raises(NotReady, match=r"Triton 9.9 was not tested; FASTATTN_UNTESTED_TRITON=1 lets it"):
        binaries.function(Flags())
    monkeypatch.setenv("FASTATTN_UNTESTED_TRITON", "1")
    assert binaries.make(Flags()) is not None


def test_no_triton(binaries: Binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "compiler", lambda: None)
    with pytest.raises(NotReady, match="triton is not installed"):
        binaries.function(Flags())


# On disk.


def test_another_process_finds_it_on_disk(binaries: Binaries, log: Path, driver: Driver) -> None:
    binaries.make(Flags())
    other = another(log)
    found = other.ask(Flags())
    assert found is not None and other.ready(Flags()) is found
    assert len(compiled(log)) == 1
    stats = other.stats()
    assert (stats["disk_loads"], stats["compiles"]) == (1, 0) and 0 < stats["disk_load_ms"] < 1000
    found.load(0)
    assert driver.loaded == [cubin(Flags())]


def test_another_label_is_another_binary(binaries: Binaries, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries.make(Flags())
    assert another(log).find(Flags("good", 1)) is None
    monkeypatch.setattr(module, "label", lambda flags: b"another compiler\n" + label(flags))
    assert another(log).find(Flags()) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_ignored_and_made_anew(binaries: Binaries, log: Path, folder: Path, damage: str) -> None:
    binaries.make(Flags())
    (path,) = folder.glob("*.kernel")
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-3], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b"", "foreign": b"x" * 999}[damage]
    )
    other = another(log)
    assert other.find(Flags()) is None
    other.make(Flags())
    assert path.read_bytes() == whole and len(compiled(log)) == 2


def test_a_file_without_a_binary_in_it_is_discarded(binaries: Binaries, folder: Path) -> None:
    FILES.store(label(Flags()), b"{}\nnothing")
    assert list(folder.glob("*.kernel"))
    assert binaries.find(Flags()) is None
    assert not list(folder.glob("*.kernel"))


@pytest.mark.parametrize("what", ["off", "no folder", "read only"])
def test_without_a_disk_everything_works(
    binaries: Binaries, folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "off":
        monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    elif what == "no folder":
        folder.write_text("a file")
    else:
        monkeypatch.setattr(os, "mkdir", lambda *arguments, **rest: (_ for _ in ()).throw(PermissionError("no")))
    assert binaries.make(Flags()) is not None
    assert another(log).find(Flags()) is None
    assert not folder.is_dir()


def test_two_processes_compile_it_once(binaries: Binaries, log: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    flags, other = Flags(f"until {go}"), another(log)
    binaries.ask(flags)
    while not compiled(log):
        time.sleep(0.01)
    other.ask(flags)
    time.sleep(0.5)
    go.touch()
    assert binaries.wait(20.0) and other.wait(20.0)
    assert binaries.ready(flags) and other.ready(flags)
    assert len(compiled(log)) == 1 and other.stats()["disk_loads"] == 1
    other.compilers.stop()


# Processes.


def test_a_process_without_work_ends(log: Path) -> None:
    binaries = Binaries(Compilers(command(log), idle=0.2))
    binaries.make(Flags())
    (pid,) = processes(log)
    assert _gone(pid)
    assert binaries.make(Flags("good", 1)) is not None
    assert len(processes(log)) == 2
    binaries.compilers.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_forked_child_starts_afresh(binaries: Binaries, log: Path, tmp_path: Path) -> None:
    go, said = tmp_path / "go", tmp_path / "said"
    coming = Flags(f"until {go}")
    binaries.make(Flags())
    binaries.ask(coming)
    while len(compiled(log)) < 2:
        time.sleep(0.01)
    pid = os.fork()
    if not pid:
        try:
            assert binaries.ready(Flags()) is not None
            assert binaries.state(coming)[1] and coming not in binaries._jobs  # nobody makes it here
            assert binaries.make(Flags("good", 1)) is not None
            said.write_text("fine")
            binaries.compilers.stop()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert said.exists()
    go.touch()
    assert binaries.wait(20.0) and binaries.ready(coming)  # the parent's process is the parent's still


def _gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
