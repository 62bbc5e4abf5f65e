"""What stands between a command and the shell: its streams, its signals, its exit status.

However a command ends, its user reads one line at most, and a script gets a status that says which kind of end it was:

    0    done
    1    it could not be done here: no memory, output that cannot be written, a fault of the machine or of ours
    2    bad input: an argument, a file, a model
    130  Ctrl-C
    141  whoever read the output has gone (`| head`): nothing is said
    143  SIGTERM (129 for SIGHUP)

`FASTATTN_DEBUG=1` shows the traceback of whatever ended it, instead of the line.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ..common.failures import is_out_of_memory
from ..common.printable import one_line
from ..config import is_on

INTERRUPTED, PIPE_CLOSED = 130, 141
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
#: What is wrong with a file that was named, rather than with the machine.
_NAMED = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: what Ctrl-C stops, they stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def stopped_by(error: KeyboardInterrupt) -> int:
    """The exit status of a command that Ctrl-C or a signal ended."""
    return error.status if isinstance(error, Terminated) else INTERRUPTED


class OutputLost(BaseException):
    """stdout cannot be written. No Exception: whoever tries one thing after another must not go on without it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno = error.errno


def guarded(run: Callable[[], int]) -> int:
    """Runs a command and returns its exit status, having said in one line on stderr why, where it is not its own.

    Raises SystemExit where `run` does. Everything written to stdout has arrived when this returns.
    """
    if 1 in _open_streams():
        return complain("stdout is closed: expected a place for what is printed, such as /dev/null", 1)
    try:
        debugging = is_on("FASTATTN_DEBUG", False)
    except ValueError as error:
        return complain(str(error), 2)
    stdout = sys.stdout
    output: Any = _Output(stdout)
    try:
        with _signals_raise():
            sys.stdout = output
            try:
                return run()
            finally:
                # Else a full disk would show when Python ends, after everything else.
                output.flush()
                sys.stdout = stdout
    except KeyboardInterrupt as stop:
        _say("fastattn: terminated" if isinstance(stop, Terminated) else "fastattn: interrupted")
        return stopped_by(stop)
    except OutputLost as lost:
        sys.stdout = stdout
        _forget(stdout)
        if lost.errno == errno.EPIPE:
            return PIPE_CLOSED
        return complain(f"stdout cannot be written: {lost}", 1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stderr):
            _forget(sys.stderr)
            return PIPE_CLOSED
        if debugging:
            raise
        return _failed(error)


def complain(text: str, status: int) -> int:
    """Says what is wrong, in one line on stderr; returns the exit status."""
    _say(f"fastattn: error: {one_line(text, '; ')}")
    return status


def standard_input() -> str:
    """All of stdin, which is UTF-8 whatever the locale says. ValueError where it is closed or is something else."""
    if sys.stdin is None or 0 in _were_closed:
        raise ValueError("prompt: - reads stdin, which is closed")
    raw = getattr(sys.stdin, "buffer", None)
    try:
        text = sys.stdin.read() if raw is None else raw.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt: expected UTF-8 on stdin: {error}") from error
    except OSError as error:
        raise ValueError(f"prompt: stdin cannot be read: {error}") from error
    return str(text)


def argument_text(text: str, name: str) -> str:
    """An argument that is text and no path, whose bytes are UTF-8 whatever the locale says.

    Raises ValueError, naming it, where they are not.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:  # Python keeps the bytes that it cannot decode as surrogates
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError as error:
            raise ValueError(f"{name}: expected UTF-8 text: {error}") from error


def _failed(error: Exception) -> int:
    text = str(error) or type(error).__name__
    if is_out_of_memory(error):
        where = "GPU memory" if type(error).__name__ == "OutOfMemoryError" or "CUDA" in text else "memory"
        first = text.splitlines()[0]
        return complain(f"out of {where}" + ("" if first == type(error).__name__ else f": {first}"), 1)
    if isinstance(error, (ValueError, ImportError, *_NAMED)):
        return complain(text, 2)
    if isinstance(error, OSError):
        return complain(text, 1)
    return complain(
        f"this should not have happened ({type(error).__name__}: {one_line(text)[:400]}): "
        "please report it, with what FASTATTN_DEBUG=1 shows",
        1,
    )


class _Output:
    """stdout, with failures of its own type. A character that it cannot encode is printed as its escape."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            raise OutputLost(error) from error

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _reader_is_gone(stream: Any) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(what & select.POLLERR for _, what in poll.poll(0))
    return False


def _forget(stream: Any) -> None:
    """Lets what is still in a stream's buffer go nowhere: at its end Python would try again, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


_were_closed: set[int] = set()  #: of stdin, stdout and stderr, when the command began


def _open_streams() -> set[int]:
    """Opens /dev/null for each of the three streams that the shell closed: else the next file opened would be it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _were_closed.add(number)
            with suppress(OSError):
                null = os.open(os.devnull, os.O_RDWR)
                if null != number:
                    os.dup2(null, number)
                    os.close(null)
    if sys.stderr is None:  # print() would take that for stdout
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    return _were_closed


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end a command as Ctrl-C does, unless somebody decided otherwise."""
    mine = []
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _terminate)
                mine.append(number)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated(number)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
