"""The mask function says what eager attention's dense mask says, in O(S) wherever it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import tiny_models  # noqa: F401  (registers "fastattn", quietly)
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as hf
from transformers.masking_utils import eager_mask, sdpa_mask

from fastattn.integrations.transformers import interval_mask, lazy_mask
from fastattn.integrations.transformers import mask as mask_module
from fastattn.integrations.transformers.lazy_mask import Band, CausalSegments, compact_of
from fastattn.integrations.transformers.patterns import Pattern, recognise
from fastattn.masks import Intervals

#: q_length, kv_length, q_offset, kv_offset
PLACES: dict[str, tuple[int, int, int, int]] = {
    "one shot": (9, 9, 0, 0),
    "one token": (1, 1, 0, 0),
    "decode": (1, 9, 8, 0),
    "chunk": (4, 9, 5, 0),
    "sliding cache": (4, 6, 5, 3),
    "sliding decode": (1, 3, 8, 6),
    "static, empty": (4, 12, 0, 0),
    "static": (4, 12, 3, 0),
    "static decode": (1, 12, 7, 0),
    "static, full": (4, 12, 8, 0),
    "static sliding, wrapping": (5, 8, 3, 0),
}
FUNCTIONS: dict[str, Callable[[int], Any]] = {
    "causal": lambda batch: hf.causal_mask_function,
    "sliding": lambda batch: hf.sliding_window_causal_mask_function(3),
    "sliding, long": lambda batch: hf.sliding_window_causal_mask_function(50),
    "chunked": lambda batch: hf.chunked_causal_mask_function(4, torch.zeros(batch, dtype=torch.long)),
    "chunked, padded": lambda batch: hf.chunked_causal_mask_function(4, torch.arange(batch)),
    "bidirectional": lambda batch: hf.bidirectional_mask_function,
    "bidirectional sliding": lambda batch: hf.sliding_window_bidirectional_mask_function(2),
}
PADDING: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda batch, length: None,
    "all real": lambda batch, length: torch.ones(batch, length, dtype=torch.bool),
    "left": lambda batch, length: torch.arange(length) >= torch.arange(batch)[:, None],
    "right": lambda batch, length: torch.arange(length) < length - torch.arange(batch)[:, None],
    "holes": lambda batch, length: torch.arange(length) % 4 != torch.arange(batch)[:, None],
    "nothing real": lambda batch, length: torch.zeros(batch, length, dtype=torch.bool),
}


def hint_of(mask: Tensor) -> Any:
    compact = compact_of(mask)
    assert compact is not None
    return compact.hint


def is_interval(mask: Tensor) -> bool:
    """True where the mask is O(S) numbers."""
    compact = compact_of(mask)
    assert compact is not None
    return isinstance(compact.visible, Intervals)


def seen_through(mask: Tensor) -> Tensor:
    """The compact form as dense bool, broadcastable to `[B, 1, Sq, Skv]`."""
    compact = compact_of(mask)
    assert compact is not None
    if isinstance(compact.visible, Intervals):
        for bound in compact.visible:
            assert bound.dtype == torch.int32
            assert bound.shape[0] == mask.shape[0]
            assert bound.shape[1] in (1, mask.shape[2])
            assert bound.is_contiguous()
    return compact.dense(mask.shape[-1])


def seen_through_band(mask: Tensor) -> Tensor | None:
    band = hint_of(mask)
    if not isinstance(band, Band):
        return None
    q_length, kv_length = mask.shape[-2:]
    assert band.keys <= kv_length
    i, j = torch.arange(q_length)[:, None] + band.keys - q_length, torch.arange(kv_length)
    seen = (j < band.keys).expand(q_length, -1)
    if band.left >= 0:
        seen = seen & (j >= i - band.left)
    if band.right >= 0:
        seen = seen & (j <= i + band.right)
    return seen[None, None]


def same_as_segments(mask: Tensor, seen: Tensor) -> None:
    """What a mask says of the queries in its segments, if it has any, and that those are all that are no padding."""
    hint = hint_of(mask)
    if not isinstance(hint, CausalSegments):
        return
    batch, q_length, kv_length = seen.shape[0], *seen.shape[2:]
    q, k = torch.empty(batch, 1, q_length, 4), torch.empty(batch, 1, kv_length, 4)
    found = naive.visible(q, k, mask=hint.segments, window=(hint.left, -1))
    real = found.any(-1, keepdim=True)
    assert torch.equal(found, seen & real)
    if hint.segments.table.shape[0] == 3:  # there a query is real when it sees itself
        assert torch.equal(seen.diagonal(dim1=-2, dim2=-1), real[..., 0])


def check(batch: int, place: tuple[int, int, int | Tensor, int], function: Any, padding: Tensor | None) -> Tensor:
    names = ("q_length", "kv_length", "q_offset", "kv_offset")
    request: dict[str, Any] = dict(zip(names, place, strict=True))
    request |= {"batch_size": batch, "mask_function": function, "attention_mask": padding}
    expected = sdpa_mask(**request, allow_is_causal_skip=False)
    found = interval_mask(**request, dtype=torch.float16)
    assert found.shape == expected.shape
    assert torch.equal(seen_through(found).expand_as(expected), expected)
    band = seen_through_band(found)
    assert band is None or torch.equal(band.expand_as(expected), expected)
    same_as_segments(found, expected)
    dense = eager_mask(**request, dtype=torch.float16)
    assert torch.equal(found + 0, dense), "who computes with the mask gets what eager attention gets"
    return found


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_agrees_with_the_dense_mask(place: str, function: str, padding: str) -> None:
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    real = PADDING[padding](3, min(q_offset + q_length, kv_offset + kv_length))
    for offset in (q_offset, torch.tensor(q_offset)):
        check(3, (q_length, kv_length, offset, kv_offset), FUNCTIONS[function](3), real)


@pytest.mark.parametrize("remapped", [False, True])
@pytest.mark.parametrize("inner", ["causal", "sliding", "chunked"])
def test_packing(inner: str, remapped: bool) -> None:
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    ids = hf.find_packed_sequence_indices(position)
    function = FUNCTIONS[inner](2)
    if remapped:
        if not hasattr(hf, "remap_positions_for_packed_sequence"):
            pytest.skip("this transformers does not remap positions")
        function = hf.remap_positions_for_packed_sequence(function, position)
        function = hf.and_masks(function, hf.packed_sequence_mask_function(ids))
    else:
        function = hf.and_masks(function, hf.packed_sequence_mask_function(ids))
    with no_dense_mask():
        mask = interval_mask(2, 9, 9, mask_function=function)
    expected = sdpa_mask(2, 9, 9, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(seen_through(mask), expected)


def test_packing_that_is_no_interval_is_dense() -> None:
    ids = torch.tensor([[0, 1, 0, 1, 0, 1]])
    function = hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(ids))
    assert not is_interval(check(1, (6, 6, 0, 0), function, None))


@contextmanager
def no_dense_mask() -> Iterator[None]:
    """Fails where the mask function evaluates its function densely."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("evaluated densely")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_module, "sdpa_mask", fail)
        patch.setattr(mask_module, "scan", fail)
        yield


@pytest.mark.parametrize("padding", [name for name in PADDING if name != "holes"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_known_functions_are_read_not_evaluated(function: str, padding: str) -> None:
    with no_dense_mask():
        interval_mask(3, 9, 9, mask_function=FUNCTIONS[function](3), attention_mask=PADDING[padding](3, 9))


def test_plain_masks_are_bands() -> None:
    """What the fastest kernels do without a mask."""
    full = torch.ones(2, 9, dtype=torch.bool)
    window, both = hf.sliding_window_causal_mask_function, hf.bidirectional_mask_function
    assert hint_of(interval_mask(2, 9, 9)) == (9, -1, 0)
    assert hint_of(interval_mask(2, 9, 9, attention_mask=full)) == (9, -1, 0)
    assert hint_of(interval_mask(2, 1, 9, q_offset=8, attention_mask=full)) == (9, -1, 0)
    assert hint_of(interval_mask(2, 4, 9, q_offset=5)) == (9, -1, 0)
    assert hint_of(interval_mask(2, 9, 9, mask_function=window(9))) == (9, -1, 0)
    assert hint_of(interval_mask(2, 4, 9, mask_function=both, attention_mask=full)) == (9, -1, -1)


def test_none_means_every_key_as_in_eager_attention() -> None:
    both = hf.bidirectional_mask_function
    full, left = torch.ones(2, 9, dtype=torch.bool), PADDING["left"](2, 9)
    skip = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": True}
    assert interval_mask(2, 9, 9, **skip) is not None, "causal"
    assert interval_mask(2, 1, 9, q_offset=8, **skip) is not None, "a single query"
    assert interval_mask(2, 9, 9, mask_function=both, attention_mask=left, **skip) is not None
    assert interval_mask(2, 9, 9, mask_function=both, allow_is_bidirectional_skip=False) is not None
    for padding in (None, full):
        assert interval_mask(2, 9, 9, mask_function=both, attention_mask=padding, **skip) is None


def test_bands() -> None:
    sliding = hf.sliding_window_causal_mask_function(3)
    assert hint_of(interval_mask(2, 9, 9, mask_function=sliding)) == (9, 2, 0)
    assert hint_of(interval_mask(2, 4, 6, 5, 3, mask_function=sliding)) == (6, 2, 0)
    assert hint_of(interval_mask(2, 9, 20)) == (9, -1, 0)  # an empty static cache
    assert hint_of(interval_mask(2, 4, 20, torch.tensor(5))) == (9, -1, 0)  # and one that holds 5
    assert hint_of(interval_mask(2, 1, 20, torch.tensor(5))) is None  # not worth a wait
    hint = hint_of(interval_mask(2, 9, 9, attention_mask=PADDING["left"](2, 9)))
    assert isinstance(hint, CausalSegments) and hint.segments.causal
    assert hint.segments.table.tolist()[1:] == [[0, 1], [9, 9]], "tokens from the first real one to the last"
    assert hint_of(interval_mask(2, 1, 9, 8, attention_mask=PADDING["left"](2, 9))) is None, "a kernel of its own"


def test_the_live_length_of_a_static_cache_is_copied() -> None:
    length = torch.tensor(5)
    mask = interval_mask(1, 1, 12, length)
    length.add_(1)
    assert (mask == 0).sum() == 6


def test_composed_functions_with_unknown_parts_are_evaluated() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1]])  # bidirectional image blocks

    def block(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (blocks[b, q] == blocks[b, k]) & (blocks[b, q] >= 0)

    function = hf.or_masks(hf.causal_mask_function, block)
    assert recognise(function) is None
    mask = check(1, (9, 9, 0, 0), function, None)
    assert is_interval(mask), "one block is one interval"
    blocks[0, 5:7] = 0  # a block in two parts is none
    mask = check(1, (9, 9, 0, 0), function, None)
    assert not is_interval(mask)
    mask = interval_mask(1, 9, 9, mask_function=hf.causal_mask_function, use_vmap=True)
    assert not is_interval(mask)


def test_recognise() -> None:
    assert recognise(hf.causal_mask_function) == Pattern(right=0)
    assert recognise(hf.and_masks(hf.causal_mask_function, hf.sliding_window_overlay(4))) == Pattern(3, 0)
    assert recognise(hf.and_masks(hf.sliding_window_overlay(4), hf.sliding_window_overlay(2))) == Pattern(1)
    assert recognise(lambda b, h, q, k: k <= q) is None
    assert recognise(hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: k >= 0)) is None
    assert recognise(hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function)) is None
    assert recognise(hf.padding_mask_function(torch.ones(1, 3, dtype=torch.bool))) is None


class Watch(TorchDispatchMode):
    """Remembers the largest tensor made, and fails on a host read of device data."""

    def __init__(self, reads_allowed: bool = True) -> None:
        super().__init__()
        self.largest, self.reads_allowed = 0, reads_allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.reads_allowed:
            raise AssertionError("read device data on the host")
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_no_mask_of_size_s_squared() -> None:
    length = 2048
    position = torch.arange(length)[None] % 700
    ids = hf.find_packed_sequence_indices(position)
    packed = hf.and_masks(hf.sliding_window_causal_mask_function(100), hf.packed_sequence_mask_function(ids))
    chunked = hf.chunked_causal_mask_function(512, torch.tensor([5]))
    left = PADDING["left"](2, length)
    with Watch() as watch:
        for function in (hf.causal_mask_function, hf.sliding_window_causal_mask_function(99), chunked, packed):
            interval_mask(1, length, length, mask_function=function)
            interval_mask(2, length, length, mask_function=function, attention_mask=left)
            if function is not packed:  # packing is for sequences without a cache
                interval_mask(2, length, 2 * length, torch.tensor(7), mask_function=function)
    assert watch.largest <= 64 * length


@pytest.mark.parametrize("function", ["causal", "sliding", "chunked", "bidirectional"])
def test_a_graph_can_be_captured_without_host_reads(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask_function = FUNCTIONS[function](2)
    with Watch(reads_allowed=False):
        decode = interval_mask(2, 1, 12, torch.tensor(4), mask_function=mask_function)
        interval_mask(2, 9, 9, mask_function=mask_function)
    assert is_interval(decode)
    for module in (mask_module, lazy_mask):
        monkeypatch.setattr(module, "is_tracing", lambda tensor=None: True)
    real = PADDING["left"](2, 12)
    with Watch(reads_allowed=False):
        prefill = interval_mask(2, 4, 12, torch.tensor(4), mask_function=mask_function)
        padded = interval_mask(2, 1, 12, torch.tensor(4), mask_function=mask_function, attention_mask=real)
    assert type(prefill) is Tensor, "the compiler drops it where only its compact form is read"
    assert is_interval(prefill)
    assert not is_interval(padded), "whether it has holes cannot be known"
