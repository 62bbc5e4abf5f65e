"""However a command ends: one line at most, the right status, no traceback. In this process, and from a real shell."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import make

from fastattn.cli import main as cli
from fastattn.cli import terminal

#: Each subcommand, and the function that it runs.
COMMANDS = {
    "benchmark": "fastattn.cli.benchmark.run",
    "generate --model x --prompt y": "fastattn.cli.generate.run",
    "sweep op": "fastattn.cli.sweep.run",
    "warmup --model tiny": "fastattn.cli.warmup.run",
    "doctor": "fastattn.cli.main._doctor",
    "explain --q 1,2,3,4": "fastattn.cli.main._explain",
}
#: How each can fail -> status, and what stderr says.
FAILURES: list[tuple[BaseException, int, str]] = [
    (KeyboardInterrupt(), 130, "fastattn: interrupted\n"),
    (terminal.Terminated(signal.SIGTERM), 143, "fastattn: terminated\n"),
    (terminal.Terminated(signal.SIGHUP), 129, "fastattn: terminated\n"),
    (MemoryError(), 1, "fastattn: error: out of memory\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore"), 1,
     "fastattn: error: out of GPU memory: CUDA out of memory. Tried to\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), 1,
     "fastattn: error: out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes\n"),
    (RuntimeError("CUDA error: out of memory"), 1, "fastattn: error: out of GPU memory: CUDA error: out of memory\n"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1,
     "fastattn: error: out of memory: [Errno 12] Cannot allocate memory\n"),
    (OSError(errno.EIO, "Input/output error", "disk"), 1,
     "fastattn: error: [Errno 5] Input/output error: 'disk'\n"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2,
     "fastattn: error: [Errno 13] Permission denied: 'x'\n"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "fastattn: error: [Errno 32] Broken pipe\n"),  # not stdout's
    (ValueError("a\nb\x1b[2J\udcff"), 2, "fastattn: error: a; b\\x1b[2J\\udcff\n"),
    (ImportError("liger"), 2, "fastattn: error: liger\n"),
    (ValueError(), 2, "fastattn: error: ValueError\n"),
    (KeyError("x"), 1, "fastattn: error: this should not have happened (KeyError: 'x'): "
     "please report it, with what FASTATTN_DEBUG=1 shows\n"),
    (RecursionError("maximum recursion depth exceeded"), 1, "fastattn: error: this should not have happened "
     "(RecursionError: maximum recursion depth exceeded): please report it, with what FASTATTN_DEBUG=1 shows\n"),
]  # fmt: skip


def status_of(line: str) -> int:
    try:
        return cli.main(line.split())
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(autouse=True)
def nobody_debugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)


@pytest.mark.parametrize("line, run", COMMANDS.items(), ids=[line.split()[0] for line in COMMANDS])
@pytest.mark.parametrize("error, status, text", FAILURES, ids=[repr(error)[:50] for error, _, _ in FAILURES])
def test_each_failure_of_each_command(capsys, monkeypatch, line, run, error, status, text):
    def fail(*_: Any) -> int:
        print("some of it")
        raise error

    monkeypatch.setattr(run, fail)
    assert status_of(line) == status
    assert capsys.readouterr() == ("some of it\n", text)


def test_every_command_is_tested():
    actions = next(a for a in cli._parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    assert {line.split()[0] for line in COMMANDS} == set(actions.choices)


@pytest.mark.parametrize("run", COMMANDS.values(), ids=[line.split()[0] for line in COMMANDS])
def test_signals_reach_each_command(capsys, monkeypatch, run):
    line = next(line for line in COMMANDS if COMMANDS[line] == run)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        monkeypatch.setattr(run, lambda _, number=number: signal.raise_signal(number) or 0)
        assert status_of(line) == status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capsys.readouterr().err == "fastattn: terminated\n" * 2 + "fastattn: interrupted\n"


def test_a_signal_that_somebody_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        monkeypatch.setattr("fastattn.cli.main._doctor", lambda _: signal.raise_signal(signal.SIGHUP) or 0)
        assert status_of("doctor") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


class Sink(io.RawIOBase):
    """What stands behind stdout: takes so many bytes, then fails."""

    def __init__(self, number: int, room: int) -> None:
        self.number, self.room, self.taken = number, room, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.number and len(self.taken) + len(data) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        self.taken += bytes(data)
        return len(data)


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Sink] = []

    def make(number: int, room: int = 0, **options: Any) -> Sink:
        made.append(Sink(number, room))
        stream = io.TextIOWrapper(io.BufferedWriter(made[-1], 64), encoding=options.pop("encoding", "utf-8"), **options)
        monkeypatch.setattr(sys, "stdout", stream)
        return made[-1]

    yield make
    for one in made:
        one.number = 0  # else what is left in the buffers complains when it is collected


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("line", ["explain --q 1,2,8,16 --device cpu", "doctor --json", "--help", "doctor --help",
                                  "--version", "warmup --model tiny --max-length 8 --device cpu --no-progress",
                                  "benchmark --model tiny -p 3 -g 1 -n 1 --attn sdpa --device cpu"])  # fmt: skip
def test_output_that_cannot_be_written(capsys, sink, line, room):
    if line == "--version" and room:
        pytest.skip("it fits")
    sink(errno.ENOSPC, room)
    assert status_of(line) == 1
    assert capsys.readouterr().err == "fastattn: error: stdout cannot be written: [Errno 28] No space left on device\n"
    sink(errno.EPIPE, room)
    assert status_of(line) == 141
    assert capsys.readouterr().err == ""


def test_lost_output_ends_what_tries_one_thing_after_another(capsys, monkeypatch, sink):
    """The benchmark gives up an implementation that fails, and goes on with the next."""
    from fastattn.bench import model

    sink(errno.EPIPE, 0)
    seen = []
    kept = model._trial
    monkeypatch.setattr(model, "_trial", lambda *args: seen.append(args) or kept(*args))
    assert status_of("benchmark --model tiny -p 3 -g 1 -n 1 --attn sdpa,eager --device cpu") == 141
    assert len(seen) <= 1


@pytest.mark.parametrize(
    "encoding, errors, expected",
    [
        ("ascii", "strict", b"caf\\xe9 \\u2603 \\U0001f600 \\udcff\n"),
        ("latin-1", "strict", b"caf\xe9 \\u2603 \\U0001f600 \\udcff\n"),
        ("utf-8", "strict", "café ☃ 😀 ".encode() + b"\\udcff\n"),
        ("utf-8", "surrogateescape", "café ☃ 😀 ".encode() + b"\xff\n"),
        ("ascii", "replace", b"caf? ? ? ?\n"),
    ],
)
def test_characters_that_the_terminal_does_not_have(monkeypatch, sink, encoding, errors, expected):
    monkeypatch.setattr("fastattn.cli.main._doctor", lambda _: print("café ☃ 😀 \udcff") or 0)
    stdout = sink(0, encoding=encoding, errors=errors)
    assert status_of("doctor") == 0
    assert stdout.taken == expected


def test_text_of_arguments_is_utf8_whatever_the_locale_says(monkeypatch):
    as_ascii = "café".encode().decode("ascii", "surrogateescape")
    assert terminal.argument_text("café", "prompt") == "café"
    assert terminal.argument_text(as_ascii, "prompt") == "café"
    with pytest.raises(ValueError, match="prompt: expected UTF-8 text"):
        terminal.argument_text("caf\udce9", "prompt")  # Latin-1


def test_stdin_is_utf8_whatever_the_locale_says(monkeypatch):
    for raw, expected in (("café\n".encode(), "café\n"), (b"", "")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        assert terminal.standard_input() == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="latin-1"))
    with pytest.raises(ValueError, match="prompt: expected UTF-8 on stdin"):
        terminal.standard_input()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="prompt: - reads stdin, which is closed"):
        terminal.standard_input()


EXPLAIN = "explain --q 1,2,8,16 --device cpu"
GENERATE = "generate --model {model} -g 2 --device cpu --attn eager"
#: Written for a shell; {f} is the command, {model} a model's directory -> status, stderr (None: not looked at).
SHELL = {
    "a reader that leaves": (f"{{f}} {EXPLAIN} | true; exit ${{{{PIPESTATUS[0]}}}}", 141, ""),
    "a full disk": (f"{{f}} {EXPLAIN} > /dev/full", 1,
                    "fastattn: error: stdout cannot be written: [Errno 28] No space left on device\n"),
    "stdout closed": (f"{{f}} {EXPLAIN} >&-", 1,
                      "fastattn: error: stdout is closed: expected a place for what is printed, such as /dev/null\n"),
    "stderr closed": (f"{{f}} {EXPLAIN} --kv-heads 5 2>&-", 2, ""),
    "stdin closed": (f"{{f}} {GENERATE} --prompt - <&-", 2,
                     "fastattn: error: --prompt: - reads stdin, which is closed\n"),
    "an ASCII terminal": (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {{f}} {GENERATE} --prompt $'w3 \\xc3\\xa9'",
                          0, None),
    "a prompt in Latin-1": (f"{{f}} {GENERATE} --prompt $'w3 \\xe9'", 2, None),
    "no such directory, in Latin-1": (f"{{f}} {GENERATE} --prompt x --model $'\\xe9'", 2, None),
    "half the pipeline's stderr": (f"{{f}} {EXPLAIN} --kv-heads 5 2>&1 | true; exit ${{{{PIPESTATUS[0]}}}}", 2, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("terminal") / "model")


@pytest.mark.parametrize("line, status, text", SHELL.values(), ids=SHELL)
def test_from_the_shell(model, tmp_path, line, status, text):
    command = line.format(f=f"{sys.executable} -m fastattn", model=model)
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False, cwd=tmp_path)
    stderr = done.stderr.decode()
    assert done.returncode == status, stderr
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    if text is not None:
        assert stderr == text
    elif status:
        assert stderr.startswith("fastattn: error: ") and stderr.count("\n") == 1, stderr
    if "ASCII" in line or "LC_ALL" in line:
        assert done.stdout.startswith(b"w3 \\xe9"), done.stdout


@pytest.mark.parametrize("number, status, text", [
    (signal.SIGTERM, 143, "fastattn: terminated\n"), (signal.SIGINT, 130, "fastattn: interrupted\n")])  # fmt: skip
def test_a_signal_while_it_works(number, status, text):
    line = "benchmark --model tiny -p 3 -g 1 -n 9 --attn sdpa --device cpu --delay 100"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fastattn", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and "Model tiny" in process.stdout.readline()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (status, text)


def test_debugging_shows_the_traceback_of_anything(monkeypatch):
    monkeypatch.setenv("FASTATTN_DEBUG", "1")
    for error, status, _ in FAILURES:

        def fail(_: Any, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr("fastattn.cli.main._doctor", fail)
        if isinstance(error, KeyboardInterrupt):
            assert status_of("doctor") == status
        else:
            with pytest.raises(type(error)):
                status_of("doctor")


def test_json_on_an_ascii_terminal_is_json(monkeypatch, sink):
    stdout = sink(0, encoding="ascii")
    assert status_of("doctor --json") == 0
    assert json.loads(stdout.taken)
