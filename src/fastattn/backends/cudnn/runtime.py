"""The cuDNN library as this process sees it: is it there, which version, and what a thread launches plans with."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

import torch

from ..._compat import torch as torch_internals
from ..base import OutOfMemory, Setback
from ..errors import memory_is_short, says_memory

MINIMUM_FRONTEND = (1, 28)
MINIMUM_CUDNN = 91300


class Frontend(NamedTuple):
    """The cuDNN frontend, or why it cannot be used."""

    cudnn: Any  #: the module `cudnn`, None if unusable
    version: int  #: of the cuDNN library itself, e.g. 91900 for 9.19.0; 0 if unusable
    refusal: str  #: what is missing and how to get it; "" if usable


@cache
def frontend() -> Frontend:
    """Loads the frontend on first use. Whatever is wrong becomes the refusal, but for memory that ran out: raised, and
    so not remembered."""
    try:
        import cudnn
    except MemoryError:
        raise
    except Exception as error:
        return Frontend(
            None, 0, f"the cuDNN frontend cannot be imported ({_line(error)}): pip install 'fastattn[cuda]'"
        )
    found = tuple(int(part) for part in cudnn.__version__.split(".")[:2])
    if found < MINIMUM_FRONTEND:
        return Frontend(
            None, 0, f"cuDNN frontend {cudnn.__version__} is too old: pip install 'nvidia-cudnn-frontend>=1.28'"
        )
    try:
        version = int(cudnn.backend_version())
    except MemoryError:
        raise
    except Exception as error:
        return Frontend(None, 0, f"the cuDNN library cannot be loaded ({_line(error)}): pip install nvidia-cudnn-cu13")
    if version < MINIMUM_CUDNN:
        return Frontend(None, version, f"cuDNN {version_text(version)} is too old: 9.13 or newer is needed")
    return Frontend(cudnn, version, "")


def version_text(version: int) -> str:
    """91900 -> "9.19.0"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


class Context:
    """What a thread launches plans with: a cuDNN handle, and room for the addresses of a plan's tensors.

    Handles are not thread-safe, so each thread has its own. A handle is not destroyed but handed on when its thread
    ends: there are never more than there were threads at once.
    """

    __slots__ = ("address", "handle", "index", "pointers", "stream")

    def __init__(self, index: int) -> None:
        self.index = index
        try:
            self.handle = _handles[index].pop()
        except IndexError:
            with torch.cuda.device(index):
                self.handle = _new_handle(index)
        self.stream = -1
        self.pointers = (ctypes.c_int64 * MOST_OPERANDS)()
        self.address = ctypes.addressof(self.pointers)

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None and _handles is not None:  # at the interpreter's end modules are emptied
            _handles[self.index].append(handle)


def _new_handle(index: int) -> Any:
    try:
        return frontend().cudnn.create_handle()
    except Exception as error:  # a GPU that is full, or busy: nothing that a call could be to blame for
        text = f"cuDNN does not start: {_line(error)}"
        raise (OutOfMemory if says_memory(error) or memory_is_short(index) else Setback)(text) from error


MOST_OPERANDS = 64
_handles: defaultdict[int, list[Any]] = defaultdict(list)  #: of threads that have ended, by device
_local = threading.local()


def context(index: int) -> Context:
    """This thread's context for a device, its handle bound to the stream that torch uses now."""
    contexts: dict[Any, Context] = _local.__dict__
    found = contexts.get(index)
    if found is None:
        found = contexts[index] = Context(index)
    stream = torch_internals.raw_stream(index)
    if found.stream != stream:
        frontend().cudnn.set_stream(found.handle, stream)
        found.stream = stream
    return found


def allow_during_captures() -> None:
    """Lets this thread build plans while another one captures a CUDA graph in "global" mode, torch's default: otherwise
    its allocations and loaded modules would end that capture. (Nothing that it does is to be captured.)"""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, no captures
        return
    relaxed = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
