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
        monkeypatch.setattr(reference, name, lambda *args, run=run: seen.append(not scratch.may_keep(7)) or run(*args))
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    out, _ = torch.ops.fastattn.attention(*prepared(q, q, q), "reference")
    out.sum().backward()
    assert seen == [True, True]
    for _ in range(2):  # the second one by the fast path
        api.scaled_dot_product_attention(q, q, q, backend="reference").sum().backward()
    assert seen == [True, True, *[False] * 4]
    with pytest.raises(ValueError, match="no allowed backend"):
        torch.ops.fastattn.attention(*prepared(q, q, q, softcap=1.0), "torch")
    assert scratch.may_keep(7)


@pytest.fixture
def allocated(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were allocated, negative of zeros. Devices are `gpu(0)` and so on; their memory is the CPU's."""
    found: list[int] = []

    def empty(size: int, dtype: torch.dtype, device: Any) -> Tensor:
        found.append(size)
        return torch.empty(size, dtype=dtype)

    def zeros(size: int, dtype: torch.dtype, device: Any) -> Tensor:
        found.append(-size)
        return torch.zeros(size, dtype=dtype)

    fake = SimpleNamespace(empty=empty, zeros=zeros, uint8=torch.uint8, int32=torch.int32, cuda=torch.cuda)
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


def test_the_default_stream_is_not_asked_whether_it_captures(
    allocated: list[int], streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA captures none of it; to ask takes torch longer than all the rest."""
    streams.current = 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("it asks"))
    assert scratch.scratch(gpu(), 10) is scratch.scratch(gpu(), 10)
    assert scratch.counted(gpu(), 10, 1, 0) is not None
    with scratch.inside_operator():
        assert not scratch.may_keep(0) and scratch.counted(gpu(), 10, 1, 0) is None


def counters(count: int = 10, stream: int = 7, index: int = 0) -> Tensor:
    found = scratch.counted(gpu(index), 1000, count, stream)
    assert found is not None and found[0].dtype == torch.uint8 and len(found[0]) >= 1000
    assert found[1].dtype == torch.int32 and len(found[1]) >= count and not found[1].any()
    return found[1]


def test_counters_are_one_streams(allocated: list[int], streams: Streams) -> None:
    """Of one device and one thread: nobody else ever counts with them."""
    first = counters()
    assert counters() is first and scratch.counted(gpu(), 10, 1, 7)[0] is scratch.scratch(gpu(), 10)  # type: ignore[index]
    found = [first, counters(stream=8), counters(index=1)]
    thread = threading.Thread(target=lambda: found.append(counters()))
    thread.start()
    thread.join()
    assert len({x.data_ptr() for x in found}) == 4
    assert counters() is first and counters(stream=8) is found[1], "another stream between them moves none"
    assert sum(size < 0 for size in allocated) == 4


def test_counters_grow_and_are_few(allocated: list[int], streams: Streams) -> None:
    first = counters(scratch._COUNTERS)
    assert counters(1) is first and len(first) == scratch._COUNTERS
    assert len(counters(scratch._COUNTERS + 1)) == scratch._COUNTERS + 1
    for stream in range(3 * scratch._STREAMS):
        counters(stream=stream)
        assert len(scratch._local.pieces.counters) <= scratch._STREAMS


@pytest.mark.parametrize("why", ["capturing", "inside an operator", "large"])
def test_counters_are_nobodys_where_a_graph_may_own_them(why: str, allocated: list[int], streams: Streams) -> None:
    kept = counters()
    streams.capturing = why == "capturing"
    with scratch.inside_operator() if why == "inside an operator" else contextlib.nullcontext():
        assert scratch.counted(gpu(), scratch._KEPT + (why == "large"), 10, 7) is None
    streams.capturing = False
    assert counters() is kept and len([size for size in allocated if size < 0]) == 1


def test_counters_of_the_interpreter_are_new(allocated: list[int]) -> None:
    one, other = (scratch.counted(torch.device("cpu"), 10, 3, 0) for _ in range(2))
    assert one is not None and other is not None and one[1].data_ptr() != other[1].data_ptr()
    assert one[1].tolist() == [0, 0, 0] and len(one[0]) == 10
