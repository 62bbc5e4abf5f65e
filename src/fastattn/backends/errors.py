"""What an error in a backend means: a call that it cannot serve, ever or for now, or an error for the caller.

Ever: a cuDNN that says "not supported", a kernel that needs more shared memory than there is. For now: memory that ran
out elsewhere than in torch's allocator (in cuDNN, cuBLAS, the driver, Triton), a library that could not start, and
whatever else cuDNN says of a plan. For the caller: torch's own OutOfMemoryError, after which there is nothing left to
give back, and everything unknown.
"""

from __future__ import annotations

import re

import torch

from ..common import failures
from .base import OutOfMemory, Refusal, Setback

#: What libraries say when their handles cannot be made, for which a full GPU is the usual reason.
_NO_START = re.compile(r"CU[A-Z]+_STATUS_NOT_INITIALIZED|CUDNN_STATUS_INTERNAL_ERROR", re.IGNORECASE)
_SHORT = 256 << 20  #: bytes free on a GPU below which a library's "not supported" is not believed


def says_memory(error: BaseException) -> bool:
    """True for an error for want of memory, torch's own included."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or failures.says_memory(str(error))


def memory_is_short(index: int) -> bool:
    """True when a GPU has so little memory left that libraries may fail for that."""
    try:
        free, _ = torch.cuda.mem_get_info(index)
    except Exception:  # no such device, or one that answers nothing any more
        return False
    return free < _SHORT


def failure_of(error: Exception, device: torch.device) -> Refusal | None:
    """What an error says of the backend that raised it; None: it is the caller's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or capturing(device):
        return None
    if type(error).__name__ == "OutOfResources" and type(error).__module__.startswith("triton"):
        return Refusal(f"{error}")
    if isinstance(error, RuntimeError):
        if says_memory(error):
            return OutOfMemory(_line(error))
        if _NO_START.search(str(error)):
            return (OutOfMemory if device.type == "cuda" and memory_is_short(device.index) else Setback)(_line(error))
    return None


def setback_of(error: Exception, index: int, unsupported: bool) -> Setback | None:
    """What it says of a plan that cuDNN did not build on GPU `index`; None: that there never is one.

    unsupported: cuDNN says so. It says so, too, of plans that it had no memory to try.
    """
    text = f"cuDNN builds no plan: {error}"
    if says_memory(error) or memory_is_short(index):
        return OutOfMemory(text)
    return None if unsupported else Setback(text)


def give_back(device: torch.device) -> bool:
    """Gives torch's unused memory back to the device, for others. False where that cannot be done."""
    if device.type != "cuda" or capturing(device):
        return False
    torch.cuda.empty_cache()
    return True


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _line(error: BaseException) -> str:
    return str(error).split("\n")[0]
