"""Ragged offsets are computed once for each stream, and never kept where they are data. (No GPU: fakes.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import a_problem
from streams import Streams
from streams import streams as streams

from fastattn.backends import scratch
from fastattn.call import Call
from fastattn.shape_cache import Section, Size

PROBLEM = a_problem(dtype=torch.float16, q_heads=4, kv_heads=2, q_len=5, kv_len=5, head_dim=8, value_dim=8)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> Callable[..., tuple[Callable[[], Any], list[Any]]]:
    """ask(changes of PROBLEM) -> a call of its offsets, and the calls that were computed."""
    pytest.importorskip("triton")
    from fastattn.backends.cudnn import ragged_offsets as module

    def make(**changes: Any) -> tuple[Callable[[], Any], list[Any]]:
        computed: list[Any] = []
        monkeypatch.setattr(module, "ragged_offsets", lambda *args: computed.append(args) or {"seq_q": torch.empty(1)})
        offsets = module.RaggedOffsets(dataclasses.replace(PROBLEM, **changes), 8, 2)
        fake = SimpleNamespace(device=SimpleNamespace(index=0))
        call = Call(fake, fake, fake)  # type: ignore[arg-type]
        return lambda: offsets({}, call), computed

    return make


def test_offsets_are_made_once_for_each_stream(ask: Any, streams: Streams) -> None:
    offsets, computed = ask()
    first = offsets()
    assert offsets() is first and len(computed) == 1
    streams.current = 8
    second = offsets()
    assert second is not first and offsets() is second and len(computed) == 2
    streams.current = 7
    assert offsets() is first and len(computed) == 2


def test_offsets_of_many_streams_are_bounded(ask: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.cudnn import ragged_offsets as module

    one = torch.empty(1).untyped_storage().nbytes()
    for entries, most_bytes, reached in ((8, 100 * one, 8), (100, 5 * one, 5)):
        kept = Section("offsets", entries, module._bytes, most_bytes)
        monkeypatch.setattr(module, "_kept", kept)
        calls, most = [ask()[0] for _ in range(3)], 0
        for stream in range(20):
            streams.current = stream
            for offsets in calls:
                assert offsets() is offsets()
                assert kept.size() == Size(len(kept), len(kept) * one, entries, most_bytes)
                most = max(most, len(kept))
        assert most == reached
    assert module._kept.max_entries <= 1 << 14 and module.MOST_BYTES <= 64 << 20


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lengths": True},
        {"kv_lengths": True},
        {"mask": "intervals", "mask_shape": (1, 1), "mask_dtype": torch.int32},
        {"mask": "segments", "mask_shape": (3, 4), "mask_dtype": torch.int32},
    ],
    ids=str,
)
def test_offsets_that_are_data_are_not_kept(changes: dict[str, Any], ask: Any) -> None:
    offsets, computed = ask(**changes)
    assert offsets() is not offsets()
    assert len(computed) == 2


def test_offsets_made_while_capturing_are_the_graphs(ask: Any, streams: Streams) -> None:
    offsets, computed = ask()
    streams.capturing = True
    graph = offsets()
    assert offsets() is not graph and len(computed) == 2
    streams.capturing = False
    kept = offsets()
    assert kept is not graph
    streams.capturing = True
    assert offsets() is not kept, "a graph replays on any stream, and outlives what is kept"
    streams.capturing = False
    assert offsets() is kept


def test_offsets_made_inside_an_operator_are_not_kept(ask: Any) -> None:
    """torch.compile warms up a graph's memory there, and frees it all at once."""
    offsets, computed = ask()
    with scratch.inside_operator():
        inside = offsets()
        assert offsets() is not inside
    assert offsets() is not inside and len(computed) == 3
    assert offsets() is offsets()
