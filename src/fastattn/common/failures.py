"""Exceptions: their text in one line, whether memory ran out, and the input that caused them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .printable import one_line

_LONGEST = 400  #: characters of another library's text that are shown
#: The texts of errors for lack of memory, for which libraries have no common type: torch, CUDA_ERROR_OUT_OF_MEMORY,
#: cudaErrorMemoryAllocation, CUDNN_STATUS_ALLOC_FAILED, ..._DEVICE_ALLOCATION_FAILED, CUBLAS_STATUS_ALLOC_FAILED, C++.
_NO_MEMORY = re.compile(
    r"out[ _]of[ _](device[ _])?memory|alloc(ation)?[ _]failed|ErrorMemoryAllocation|bad_alloc|"
    r"(can't|cannot) allocate memory|not enough memory",
    re.IGNORECASE,
)


class Refused(ValueError):
    """A ValueError whose message is complete and one line long: `blame` does not wrap it."""


def in_one_line(error: BaseException) -> str:
    """An exception's message in one line, cut to 400 characters; the name of its type if the message is empty."""
    text, name = one_line(str(error)), type(error).__name__
    if isinstance(error, KeyError | AttributeError | IndexError | ZeroDivisionError) or not text:
        text = f"{name}: {text}" if text else name  # the message alone is a bare name
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not empty; the name of its type if there is none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def says_memory(text: str) -> bool:
    """True for the message of an error for lack of memory."""
    return bool(_NO_MEMORY.search(text))


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception, or one in its chain of causes, means that memory ran out. Does not import torch."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, MemoryError) or type(found).__name__ == "OutOfMemoryError":
            return True
        if isinstance(found, OSError) and found.errno == errno.ENOMEM:
            return True
        # Not ValueError: its message may quote a file.
        if isinstance(found, RuntimeError) or type(found).__name__ == "SafetensorError":
            if says_memory(str(found)):
                return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Raises `Refused`, "what: message" in one line, for any exception raised in the block.

    Errors for lack of memory, Ctrl-C and `Refused` pass unchanged.
    """
    try:
        yield
    except Refused:
        raise
    except BaseException as error:
        # A Rust panic, in tokenizers or safetensors, is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error):
            raise
        raise Refused(f"{what}: {in_one_line(error)}") from error
