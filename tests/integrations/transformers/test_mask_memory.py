"""Padding, packing, windows and chunks cost no tensor of size S x S, with a cache or without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from asked_calls import calls
from static_caches import make
from tiny_models import build, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as hf

from fastattn import use_backend
from fastattn._compat.transformers import with_cache
from fastattn.integrations.transformers import interval_mask
from fastattn.integrations.transformers.device_offset import DeviceOffset
from fastattn.integrations.transformers.lazy_mask import Band, CausalSegments, compact_of
from fastattn.masks import Segments


class Largest(TorchDispatchMode):
    """Fails where a tensor has as many elements as a mask of all queries and keys."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.limit * x.element_size():
                raise AssertionError(f"{func} made {list(x.shape)}")
        return out


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 100}),
    "full": ("llama", {}),
    "chunks": ("llama4", {"attention_chunk_size": 300, "layer_types": ["chunked_attention"], "no_rope_layers": [1]}),
}
INPUTS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "plain": lambda length: {},
    "padded": lambda length: {"attention_mask": (torch.arange(length) >= torch.tensor([[0], [77]])).long()},
    "packed": lambda length: {"position_ids": (torch.arange(length) % (length // 3))[None].expand(2, -1)},
}


def run_long(kind: str, inputs: str, length: int, cached: str, device: str, **changes: Any) -> Callable[[], None]:
    """A long forward of one layer, all else small: without a cache, or in two steps with one."""
    family, settings = LONG[kind]
    model = build(family, "fastattn", num_hidden_layers=1, **settings, **changes).to(device)
    if device == "cuda":
        model = model.bfloat16()
    body, ids = model.base_model, tokens(2, length).to(device)
    given = {name: x.to(device) for name, x in INPUTS[inputs](length).items()}

    def run() -> None:
        with torch.no_grad():
            if not cached:
                body(ids, use_cache=False, **given)
                return
            cache = make(model, 2, length)
            if cached == "unknown":
                cache.forget()
            for part in torch.arange(length, device=device).split(length // 2):
                mask = {name: x[:, : int(part[-1]) + 1] for name, x in given.items()}
                body(ids[:, part], position_ids=cache.positions(len(part)), **with_cache(body, cache), **mask)

    return run


@pytest.mark.parametrize("cached", ["", "known", "unknown"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", LONG)
def test_no_tensor_of_size_s_squared(kind: str, inputs: str, cached: str) -> None:
    """Through the reference: on a CPU torch's own kernels want their masks dense."""
    if inputs == "packed" and cached:
        pytest.skip("packing is for sequences without a cache")
    length = 4096
    run = run_long(kind, inputs, length, cached, "cpu", num_attention_heads=1, num_key_value_heads=1)
    with calls() as asked, use_backend("reference"), Largest(length // (2 if cached else 1) * length):
        run()
    for call in asked:  # Intervals of many queries would become a dense bias inside of cuDNN
        assert call["mask"] in (None, "causal") or isinstance(call["mask"], Segments)


@pytest.mark.gpu
@pytest.mark.parametrize("cached", ["", "known", "unknown"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", LONG)
def test_no_memory_of_size_s_squared(kind: str, inputs: str, cached: str) -> None:
    if inputs == "packed" and cached:
        pytest.skip("packing is for sequences without a cache")
    length = 32768
    run = run_long(kind, inputs, length, cached, "cuda", head_dim=64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < length * length // (2 if cached else 1)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("known", [True, False], ids=["", "unknown"])
def test_chunks_are_segments(known: bool, padded: bool) -> None:
    """The segments of chunked attention let real queries see what the intervals let them see."""
    for start, queries, chunk in ((0, 9, 4), (3, 6, 4), (8, 5, 4), (5, 11, 3), (2, 2, 7), (6, 13, 20)):
        begin = torch.tensor([0, 2 if padded else 0])
        function = hf.chunked_causal_mask_function(chunk, begin)
        real = torch.arange(start + queries) >= begin[:, None] if padded else None
        before = min(start, chunk - 1)
        keys = before + queries if known else chunk - 1 + queries
        offset = start - before if known else DeviceOffset(torch.full((2,), start, dtype=torch.int32), chunk)
        mask = interval_mask(2, queries, keys, start, offset, function, real)
        compact = compact_of(mask)
        if not isinstance(compact.hint, CausalSegments):
            assert isinstance(compact.hint, Band)
            assert known and not padded and start + queries <= chunk
            continue
        q, k = torch.empty(2, 1, queries, 4), torch.empty(2, 1, keys, 4)
        found = naive.visible(q, k, mask=compact.hint.segments)
        seen = compact.dense(keys)
        if padded:
            seen = seen & (torch.arange(start, start + queries)[:, None] >= begin[:, None, None, None])
        assert torch.equal(found, seen.expand_as(found)), (start, queries, chunk)
