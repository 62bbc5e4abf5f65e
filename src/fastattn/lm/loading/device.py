"""Choose the device of a model."""

from __future__ import annotations

import torch


def pick_device(device: str | torch.device | None) -> torch.device:
    """The named device; default: the current GPU if there is one, else the CPU. Raises ValueError if there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(f"device: got {str(device)!r}, but torch sees {count} GPUs here")
    return found
