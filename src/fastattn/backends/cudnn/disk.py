"""Compiled plans on disk: loading one takes milliseconds, compiling its kernel 0.6 to 1.5 s.

cuDNN believes the bytes that it is given: `common/disk.py` says which files are used, and where they are.
"""

from __future__ import annotations

from functools import cache

import torch

from ..._compat import torch as torch_internals
from ...common.disk import Files
from . import runtime
from .graphs import PlanKey

FORMAT = 3  #: of these files, and of what a key means; raise it when either changes
FILES = Files("plan", 64 << 20)  #: a plan is about 80 KB


def load(key: PlanKey) -> bytes | None:
    """The serialized plan of a key, or None."""
    return FILES.load(_label(key))


def store(key: PlanKey, payload: bytes) -> None:
    """Keeps a serialized plan."""
    FILES.store(_label(key), payload)


def discard(key: PlanKey) -> None:
    """Removes the file of a key: cuDNN would not have it."""
    FILES.discard(_label(key))


def _label(key: PlanKey) -> bytes:
    return f"{_environment(key.device)}\n{key!r}".encode()


@cache
def _environment(device: int) -> str:
    library = runtime.frontend()
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "format": FORMAT,
        "frontend": getattr(library.cudnn, "__version__", None),
        "cudnn": library.version,
        "cuda": torch.version.cuda,
        "driver": torch_internals.driver_version(),
        "device": (properties.name, properties.major, properties.minor, properties.multi_processor_count),
        "memory": properties.total_memory,
    }
    return repr(facts)
