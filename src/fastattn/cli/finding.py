"""What the probes of `fastattn doctor` find, and what they share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    state: str  #: "ok", "none" (not there, and not needed), "off", "missing" or "broken"
    text: str
    advice: str = ""  #: what to do, "" when nothing


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
