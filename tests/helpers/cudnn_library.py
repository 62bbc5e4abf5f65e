"""A library that stands in for cuDNN's frontend, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn.backends.cudnn import runtime


def use_library(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """Until the test ends, `library` is the module `cudnn`; any device index may be the current one."""
    monkeypatch.setattr(runtime, "frontend", lambda: runtime.Frontend(library, 91900, ""))
    monkeypatch.setattr(runtime, "context", lambda index: SimpleNamespace(handle=1))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
