"""liger-kernel: its operations are called one by one, below the interface that it promises to keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .versions import gone

OPERATIONS = ("LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction", "LigerRopeFunction")


def installed() -> bool:
    return find_spec("liger_kernel") is not None


@cache
def operations() -> Any:
    """The module with `OPERATIONS`. Raises ImportError: not installed, does not work here, or one of them is gone."""
    if not installed():
        raise ImportError("fused_ops: liger-kernel is not installed: pip install 'fastattn[liger]'")
    try:
        found = import_module("liger_kernel.ops")
    except Exception as error:  # its import looks at devices, and at the versions of much
        raise ImportError(f"fused_ops: liger-kernel cannot be used here: {error}") from error
    for name in OPERATIONS:
        if not hasattr(found, name):
            why = gone("liger-kernel", f"liger_kernel.ops.{name}")
            raise ImportError(f"fused_ops: liger-kernel cannot be used here: {why}")
    return found


def patcher(model_type: str | None) -> Callable[..., None] | None:
    """The function that puts liger-kernel's own modules into a model of the family; None if there is none."""
    try:
        known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except (ImportError, AttributeError):
        return None
    found: Callable[..., None] | None = known.get(model_type)
    return found
