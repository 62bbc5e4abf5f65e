"""Streams, signals and exit status of a command.

A command that fails prints one line on stderr, and its exit status tells the kind of failure:

    0    success
    1    failure at run time: no memory, output that cannot be written, a fault of the machine or of fastattn
    2    bad input: an argument, a file, a model
    130  Ctrl-C
    141  the reader of the output has closed it (`| head`): nothing is printed
    143  SIGTERM (129 for SIGHUP)

`FASTATTN_DEBUG=1` prints the traceback instead of the line.
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
#: OSErrors that mean a wrong file name, not a fault of the machine.
_NAMED = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM or SIGHUP, which end a command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def stopped_by(error: KeyboardInterrupt) -> int:
    """The exit status of a command that Ctrl-C or a signal ended."""
    return error.status if isinstance(error, Terminated) else INTERRUPTED


class OutputLost(BaseException):
    """stdout cannot be written. Not an Exception, so that `except Exception` does not swallow it."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.errno = error.errno


def guarded(run: Callable[[], int]) -> int:
    """Runs a command and returns its exit status. Prints one line on stderr for an exception of `run`.

    A SystemExit of `run` passes. stdout is flushed on return.
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
                # Else an error such as a full disk would be raised only when Python exits.
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
    """Prints an error in one line on stderr; returns `status`."""
    _say(f"fastattn: error: {one_line(text, '; ')}")
    return status


def standard_input() -> str:
    """All of stdin, decoded as UTF-8 in every locale. Raises ValueError if it is closed or not UTF-8."""
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
    """A command-line argument that is text, not a path, decoded as UTF-8 in every locale.

    Raises ValueError, naming it, if its bytes are not UTF-8.
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
    """stdout whose write errors are `OutputLost`. Prints a character that it cannot encode as an escape."""

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
    """Sends what is left in a stream's buffer to /dev/null: Python would write it again on exit, and report it."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


_were_closed: set[int] = set()  #: of stdin, stdout and stderr, when the command started


def _open_streams() -> set[int]:
    """Opens /dev/null for each standard stream that the shell closed: else the next open file would take its number."""
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
    """Within the block SIGTERM and SIGHUP raise `Terminated`, unless they have a handler."""
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
