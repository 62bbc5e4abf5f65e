"""Scratch memory is reused by one thread on one stream, and never where a graph may own it. (No GPU: fakes.)"""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prepared import prepared
from streams import Streams
from streams import streams as streams
from torch import Tensor

from fastattn.backends import scratch


def test_operators_say_that_they_are_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and the backward, and no longer."""
    from fastattn import api, reference

    seen: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("forward", "backward"):
        run = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args, run=run: seen.append(not scratch.may_keep()) or run(*args))
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    out, _ = torch.ops.fastattn.attention(*prepared(q, q, q), "reference")
    out.sum().backward()
    assert seen == [True, True]
    for _ in range(2):  # the second one by the fast path
        api.scaled_dot_product_attention(q, q, q, backend="reference").sum().backward()
    assert seen == [True, True, *[False] * 4]
    with pytest.raises(ValueError, match="no allowed backend"):
        torch.ops.fastattn.attention(*prepared(q, q, q, softcap=1.0), "torch")
    assert scratch.may_keep()


@pytest.fixture
def allocated(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were allocated. Devices are `gpu(0)` and so on; their memory is the CPU's."""
    found: list[int] = []

    def empty(size: int, dtype: torch.dtype, device: Any) -> Tensor:
        found.append(size)
        return torch.empty(size, dtype=dtype)

    fake = SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=torch.cuda)
    monkeypatch.setattr(scratch, "torch", fake)
    return found


def gpu(index: int = 0) -> Any:
    return SimpleNamespace(type="cuda", index=index)


def test_scratch_is_used_again_on_its_stream(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 1000)
    assert first.dtype == torch.uint8 and first.dim() == 1
    for size in (0, 1, 1000, 65536):
        assert scratch.scratch(gpu(), size) is first
    assert allocated == [65536]


def test_scratch_grows(allocated: list[int], streams: Streams) -> None:
    for size in (1, 65536, 65537, 100_000, 131_072, 131_073, 5, 1 << 22):
        assert scratch.scratch(gpu(), size).shape[0] >= size
    assert allocated == [65536, 131_072, 262_144, 1 << 22]


def test_scratch_is_one_streams(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 10)
    streams.current = 8
    second = scratch.scratch(gpu(), 10)
    assert second.data_ptr() != first.data_ptr()
    assert scratch.scratch(gpu(), 10) is second
    streams.current = 7
    assert scratch.scratch(gpu(), 10).data_ptr() != second.data_ptr()


def test_scratch_is_one_devices(allocated: list[int], streams: Streams) -> None:
    first, second = scratch.scratch(gpu(0), 10), scratch.scratch(gpu(1), 10)
    assert first is not second
    assert scratch.scratch(gpu(0), 10) is first and scratch.scratch(gpu(1), 10) is second


def test_scratch_is_one_threads(allocated: list[int], streams: Streams) -> None:
    first = scratch.scratch(gpu(), 10)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(scratch.scratch(gpu(), 10)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != first.data_ptr()
    assert scratch.scratch(gpu(), 10) is first


@pytest.mark.parametrize("why", ["capturing", "inside an operator", "large", "on the CPU"])
def test_scratch_that_is_not_kept(why: str, allocated: list[int], streams: Streams) -> None:
    kept = scratch.scratch(gpu(), 10)
    size = scratch._KEPT + 1 if why == "large" else 10
    device = torch.device("cpu") if why == "on the CPU" else gpu()
    streams.capturing = why == "capturing"
    with scratch.inside_operator() if why == "inside an operator" else contextlib.nullcontext():
        found = [scratch.scratch(device, size) for _ in range(2)]
    streams.capturing = False
    assert len({x.data_ptr() for x in (kept, *found)}) == 3
    assert all(x.shape == (size,) for x in found)
    assert scratch.scratch(gpu(), 10) is kept
