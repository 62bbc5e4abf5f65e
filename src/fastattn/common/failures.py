"""What failures are called: an exception in one line, whether it is want of memory, and who is to blame for it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .printable import one_line

_LONGEST = 400  #: characters of another library's text that are shown
#: What libraries say that are out of memory, which have no common type for it: torch, CUDA_ERROR_OUT_OF_MEMORY,
#: cudaErrorMemoryAllocation, CUDNN_STATUS_ALLOC_FAILED, ..._DEVICE_ALLOCATION_FAILED, CUBLAS_STATUS_ALLOC_FAILED, C++.
_NO_MEMORY = re.compile(
    r"out[ _]of[ _](device[ _])?memory|alloc(ation)?[ _]failed|ErrorMemoryAllocation|bad_alloc|"
    r"(can't|cannot) allocate memory|not enough memory",
    re.IGNORECASE,
)


class Refused(ValueError):
    """A ValueError that says all there is to say, in one line: `blame` lets it through."""


def in_one_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long; its type's name where it says nothing."""
    text, name = one_line(str(error)), type(error).__name__
    if isinstance(error, KeyError | AttributeError | IndexError | ZeroDivisionError) or not text:
        text = f"{name}: {text}" if text else name  # the text alone is but a name
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not empty; the name of its type if there is none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def says_memory(text: str) -> bool:
    """True for the text of an error for want of memory."""
    return bool(_NO_MEMORY.search(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or the one that led to it, is want of memory. Needs no torch."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, MemoryError) or type(found).__name__ == "OutOfMemoryError":
            return True
        if isinstance(found, OSError) and found.errno == errno.ENOMEM:
            return True
        # What a ValueError says may be quoted from a file.
        if isinstance(found, RuntimeError) or type(found).__name__ == "SafetensorError":
            if says_memory(str(found)):
                return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turns whatever goes wrong within the block into a ValueError of one line, `what` and the cause.

    Want of memory, Ctrl-C and `Refused` stay what they are.
    """
    try:
        yield
    except Refused:
        raise
    except BaseException as error:
        # Rust's panics, of tokenizers and safetensors, are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_out_of_memory(error):
            raise
        raise Refused(f"{what}: {in_one_line(error)}") from error
