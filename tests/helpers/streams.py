"""torch's current stream as a test wants it to be. `streams` is a fixture."""

from __future__ import annotations

import pytest
import torch

from fastattn._compat import torch as torch_internals
from fastattn.backends import scratch


class Streams:
    """torch's current stream, and whether it captures."""

    def __init__(self) -> None:
        self.current = 7
        self.capturing = False


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch_internals, "raw_stream", lambda index: found.current + 100 * index)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(scratch, "_local", type(scratch._local)())
    return found
