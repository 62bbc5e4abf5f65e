"""Checks of single arguments, independent of attention; `validation` has the op's."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError for what is no tensor, ValueError for a nested or sparse one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got a nested one")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got layout {x.layout}")


def check_ints(name: str, x: object, shape: str, least: int = 0) -> None:
    """Raises unless x is an int32 tensor of one dim with at least `least` entries. shape: the shape in the message."""
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] < least:
        raise ValueError(f"{name}: expected int32 {shape}, got {x.dtype} {list(x.shape)}")


def is_count(value: object, least: int = 1) -> bool:
    """True for an int, at least 1 (or `least`), that fits 32 bits: a size, a number of rows or tokens."""
    # A SymInt is a size that may vary, under torch.export.
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and bool(least <= value < 1 << 31)


def check_count(name: str, value: object, least: int = 1) -> int:
    if not is_count(value, least):
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    return value  # type: ignore[return-value]


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def check_device(device: object) -> torch.device:
    """The torch device; for None the current GPU if there is one, else the CPU.

    Raises ValueError for what names no device, and for a GPU that this machine does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: expected a torch device, such as cpu or cuda:0, got {device!r}") from error
    count = torch.cuda.device_count() if found.type == "cuda" and torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device: got {str(device)!r}, but torch sees {count} GPUs here")
    return found  # type: ignore[no-any-return]
