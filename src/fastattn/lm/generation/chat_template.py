"""Renders chat templates in a child process with limits on time, memory and output.

A chat template is an untrusted program. transformers renders it in jinja's sandbox, which keeps it from the machine but
not from running forever or filling memory. Neither can be stopped in the process itself: `{{ 9 ** (9 ** 9) }}` does not
return to the interpreter. Therefore a forked child renders it, with transformers' code and the tokenizer as it is, and
the kernel enforces the limits.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ...common.failures import in_one_line

SECONDS = 20  #: templates take milliseconds; the rest is for busy machines
MEMORY = 1 << 30  #: bytes, in addition to those of the process
OUTPUT = 1 << 20  #: characters, in addition to eight times those of the messages
_CHUNK = 1 << 16


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], *, seconds: int = SECONDS) -> str:
    """The prompt that a tokenizer's chat template makes of messages, with the beginning of the answer.

    Raises ValueError for a tokenizer without a template, and for a template that raises, takes more than `seconds` or
    `MEMORY`, or writes more than `OUTPUT`.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat: this model's tokenizer has no chat template")
    origin = f"{tokenizer.name_or_path}: " if tokenizer.name_or_path else ""
    failed = f"chat: {origin}the chat template"
    most = OUTPUT + 8 * sum(len(message["content"]) for message in messages)
    read, write = os.pipe()
    with warnings.catch_warnings(), _quiet_tokenizers():
        # Python warns of locks that other threads may hold. Rendering takes none of them, and its time is limited.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render(tokenizer, messages, most, write, seconds)
    os.close(write)
    try:
        answer = _read(read, 12 * most + _CHUNK, seconds)
    finally:
        os.close(read)
        with suppress(ProcessLookupError, ChildProcessError):  # if SIGCHLD is ignored there is nothing to wait for
            os.kill(child, signal.SIGKILL)  # whatever ended the wait, the child is removed
            os.waitpid(child, 0)
    if answer is None:
        raise ValueError(f"{failed} does not end: it was stopped after {seconds} seconds")
    if not answer:
        raise ValueError(f"{failed} was stopped: it took more memory or time than it may")
    text, error = json.loads(answer)
    if error:
        raise ValueError(f"{failed} failed: {error}")
    return str(text)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], most: int, write: int, seconds: int) -> NoReturn:
    """The child process: writes (text, error) and exits, without the parent's exit handlers."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # stdin, stdout, stderr
            os.dup2(null, number)
        _limit(seconds)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if not isinstance(text, str):
                answer = ("", f"expected a text, got {type(text).__name__}")
            elif len(text) > most:
                answer = ("", f"it wrote {len(text)} characters, where at most {most} were expected")
            else:
                answer = (text, "")
        except MemoryError:
            answer = ("", f"it took more than {MEMORY >> 20} MiB of memory")
        except Exception as error:
            answer = ("", in_one_line(error))
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(write, data[:_CHUNK]) :]
    finally:
        os._exit(0)


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Keeps old versions of tokenizers from writing to stderr because of the fork."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _limit(seconds: int) -> None:
    """Sets limits that also hold if the parent is killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = used + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


def _read(pipe: int, most: int, seconds: int) -> bytes | None:
    """The output of the child; None if it takes too long."""
    found, end, poll = bytearray(), time.monotonic() + seconds, select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            return None
        piece = os.read(pipe, _CHUNK)
        if not piece:
            return bytes(found)
        found += piece
        if len(found) > most:
            return b""
