"""The cuDNN library as this process sees it: is it there, which version, a handle for this thread and stream."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, NamedTuple

import torch

MINIMUM_FRONTEND = (1, 28)
MINIMUM_CUDNN = 91300


class Frontend(NamedTuple):
    """The cuDNN frontend, or why it cannot be used."""

    cudnn: Any  #: the module `cudnn`, None if unusable
    version: int  #: of the cuDNN library itself, e.g. 91900 for 9.19.0; 0 if unusable
    refusal: str  #: what is missing and how to get it; "" if usable


@cache
def frontend() -> Frontend:
    """Loads the frontend on first use. Never raises: whatever is wrong becomes the refusal."""
    try:
        import cudnn
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
    except Exception as error:
        return Frontend(None, 0, f"the cuDNN library cannot be loaded ({_line(error)}): pip install nvidia-cudnn-cu13")
    if version < MINIMUM_CUDNN:
        return Frontend(None, version, f"cuDNN {version_text(version)} is too old: 9.13 or newer is needed")
    return Frontend(cudnn, version, "")


def version_text(version: int) -> str:
    """91900 -> "9.19.0"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


_local = threading.local()


def handle(index: int) -> Any:
    """This thread's cuDNN handle for a device, bound to the stream that torch uses now.

    Handles are not thread-safe, so each thread has its own; binding is free while the stream stays the same.
    """
    cudnn = frontend().cudnn
    handles = _local.__dict__.setdefault("handles", {})
    found = handles.get(index)
    if found is None:
        with torch.cuda.device(index):
            found = handles[index] = cudnn.create_handle()
    cudnn.set_stream(found, torch._C._cuda_getCurrentRawStream(index))
    return found


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
