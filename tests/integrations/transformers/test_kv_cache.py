"""The cache whose lengths live on the device says the same as transformers' own, row by row, at every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asked_calls import calls
from static_caches import CAPACITY, close, expected, make, poison, step
from tiny_models import DECODERS, WINDOW, build, left_padded, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, Qwen3NextConfig

from fastattn._compat.transformers import with_cache
from fastattn._compat.versions import Gone
from fastattn.cache import lengths
from fastattn.cache.memory import KVMemory
from fastattn.integrations.transformers import StaticCache, attention, cache_layers, kv_cache, lazy_mask
from fastattn.masks import Segments

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3", "cohere2", "llama4"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generate(family: str, padded: bool) -> None:
    ids, mask, _ = left_padded(3, 11)
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": tokens(3, 11)}
    wanted = build(family, "eager").generate(**inputs, **GREEDY)
    model = build(family, "fastattn")
    cache = make(model, 3)
    for options in ({}, {"prefill_chunk_size": 4}):
        cache.reset()
        poison(cache)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options, **with_cache(model, cache)), wanted)
    assert cache.lengths.tolist() == [19] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_as_long_as_the_cache(family: str) -> None:
    changes = {"attention_chunk_size": 64} if family == "llama4" else {"sliding_window": 64}
    ids = tokens(2, 11)
    wanted = build(family, "eager", **changes).generate(ids, **GREEDY)
    model = build(family, "fastattn", **changes)
    assert torch.equal(model.generate(ids, **GREEDY, **with_cache(model, make(model, 2))), wanted)


@pytest.mark.parametrize("known", [True, False], ids=["", "unknown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_any_size(family: str, known: bool) -> None:
    """Rings that wrap several times, in steps of one and of more tokens than the window holds."""
    ids = tokens(1, 27)
    wanted = expected(family, ids)
    model = build(family, "fastattn")
    cache = make(model, 1)
    step(model, ids[:, :3], cache)
    cache.reset()
    poison(cache)
    if not known:
        cache.forget()
        cache.reset()
    found = [step(model, part, cache) for part in ids.split([3, 1, 1, 8, 1, 2, 1, 1, 6, 3], 1)]
    close(torch.cat(found, 1), wanted)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama4"])
def test_rows_of_different_lengths(family: str) -> None:
    lengths, ids = (9, 2, 14), tokens(3, 24)
    wanted = expected(family, ids)
    model = build(family, "fastattn")
    cache = make(model, 3)
    for row, length in enumerate(lengths):
        close(step(model, ids[row : row + 1, :length], cache.view(row, 1)), wanted[row : row + 1, :length])
    assert cache.lengths.tolist() == list(lengths)
    for count in (1, 1, 3, 1, 4):
        first = cache.lengths.tolist()
        part = torch.stack([ids[row, start : start + count] for row, start in enumerate(first)])
        wanted_now = torch.stack([wanted[row, start : start + count] for row, start in enumerate(first)])
        close(step(model, part, cache), wanted_now)


def test_reset_move_and_reorder_rows() -> None:
    ids = tokens(3, 20)
    wanted = expected("gemma2", ids)
    model = build("gemma2", "fastattn")
    cache = make(model, 3)
    for row, length in enumerate((9, 4, 7)):
        step(model, ids[row : row + 1, :length], cache.view(row, 1))
    cache.move(2, 0)
    assert cache.lengths.tolist() == [7, 4, 0]
    step(model, ids[:1, :6], cache.view(2, 1))
    order = [2, 1, 0]  # what the rows hold now
    close(step(model, torch.stack([ids[2, 7], ids[1, 4], ids[0, 6]])[:, None], cache)[:, 0], wanted[order, [7, 4, 6]])
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    assert cache.lengths.tolist() == [7, 7, 5]
    close(
        step(model, torch.stack([ids[0, 7], ids[0, 7], ids[1, 5]])[:, None], cache)[:, 0], wanted[[0, 0, 1], [7, 7, 5]]
    )
    cache.reset(1)
    close(step(model, ids[1:2, :13], cache.view(1, 1)), wanted[1:2, :13])
    cache.reset()
    close(step(model, ids, cache), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beam_search(family: str) -> None:
    ids, mask, _ = left_padded(2, 9)
    inputs = {"input_ids": ids, "attention_mask": mask, "num_beams": 3, **GREEDY}
    model = build(family, "fastattn")
    found = model.generate(**inputs, **with_cache(model, make(model, 6)))
    assert torch.equal(found, build(family, "eager").generate(**inputs))


def test_crop() -> None:
    ids = tokens(2, 16)
    wanted = expected("llama", ids)
    model = build("llama", "fastattn")
    cache = make(model, 2)
    step(model, ids[:, :9], cache)
    cache.crop(-4)
    close(step(model, ids[:, 5:12], cache), wanted[:, 5:12])
    cache.crop(7)
    close(step(model, ids[:, 7:], cache), wanted[:, 7:])
    model = build("gemma2", "fastattn")
    with pytest.raises(ValueError, match="window"):
        make(model, 2).crop(-1)


def test_a_full_row_drops_tokens() -> None:
    ids = tokens(2, 12)
    wanted = expected("gemma2", ids)
    model = build("gemma2", "fastattn")
    cache = make(model, 2, capacity=8)
    step(model, ids[:, :7], cache)
    with pytest.raises(ValueError, match="full: 7 tokens of 8, 2 more"):
        step(model, ids[:, 7:9], cache)
    cache.reset(1)
    step(model, ids[1:, :3], cache.view(1, 1))
    for turn in range(4):  # row 0 fills up: what it says then is nobody's business
        found = step(model, torch.stack([ids[0, 7 + turn], ids[1, 3 + turn]])[:, None], cache)
        close(found[1, 0], wanted[1, 3 + turn])
    assert cache.lengths.tolist() == [8, 7]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_that_a_full_row_still_takes(family: str) -> None:
    """Of a step that is too long for one of the rows: they see what they would in a cache with room."""
    ids, lengths = tokens(2, 12), (6, 2)
    wanted, model = expected(family, ids), build(family, "fastattn")
    cache = make(model, 2, capacity=8)
    for row, length in enumerate(lengths):
        step(model, ids[row : row + 1, :length], cache.view(row, 1))
    found = step(model, torch.stack([ids[row, n : n + 4] for row, n in enumerate(lengths)]), cache)
    close(found[0, :2], wanted[0, 6:8])
    close(found[1], wanted[1, 2:6])
    assert cache.lengths.tolist() == [8, 6]


def test_padding_where_only_the_device_knows_the_lengths() -> None:
    for family in ("llama", "gemma2", "llama4"):
        ids, mask, positions = left_padded(3, 17)
        with torch.no_grad():
            wanted = build(family, "eager")(ids, attention_mask=mask, position_ids=positions).logits
        model = (
            build(family, "fastattn", attn_temperature_tuning=False)
            if family == "llama4"
            else build(family, "fastattn")
        )
        cache = make(model, 3)
        cache.forget()
        for part in torch.arange(17).split([6, 1, 5, 1, 1, 3]):
            end = int(part[-1]) + 1
            with torch.no_grad():
                found = model(
                    ids[:, part],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, part],
                    **with_cache(model, cache),
                ).logits
            real = mask[:, part].bool()
            close(found[real], wanted[:, part][real])


def test_padding_with_holes() -> None:
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, 3:5] = mask[1, 7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for family in ("llama", "gemma2"):
        with torch.no_grad():
            wanted = build(family, "eager")(ids, attention_mask=mask, position_ids=positions).logits
        model = build(family, "fastattn")
        for known in (True, False):
            cache = make(model, 2)
            if not known:
                cache.forget()
            for part in torch.arange(14).split([6, 1, 5, 1, 1]):
                end = int(part[-1]) + 1
                with torch.no_grad():
                    found = model(
                        ids[:, part],
                        attention_mask=mask[:, :end],
                        position_ids=positions[:, part],
                        **with_cache(model, cache),
                    ).logits
                real = mask[:, part].bool()
                close(found[real], wanted[:, part][real])


def test_arguments_of_the_op() -> None:
    model = build("gemma2", "fastattn")  # a sliding layer, then a full one
    cache = make(model, 2)
    ids = tokens(2, 20)
    with calls() as asked:
        step(model, ids[:, :7], cache)
        step(model, ids[:, 7:12], cache)
    for call, keys in zip(asked, (7, 7, 4 + 5, 12), strict=True):
        assert call["k"].shape[2] == keys, "no more keys than there are: the host knows"
        assert call["mask"] in (None, "causal"), "and a band is all that masks"
        assert "kv_lengths" not in call
    with calls() as asked:
        step(model, ids[:, 12:13], cache)
        step(model, ids[:, 13:14], cache)
    for call, keys in zip(asked, (WINDOW, CAPACITY) * 2, strict=True):
        assert call["k"].shape[2] == keys, "the same for every length"
        assert call["mask"] is None
    assert [call["kv_lengths"].tolist() for call in asked] == [[5, 5], [13, 13], [5, 5], [14, 14]]
    cache.forget()
    with calls() as asked:
        step(model, ids[:, 14:17], cache)
    for call, keys in zip(asked, (WINDOW - 1 + 3, CAPACITY), strict=True):
        assert call["k"].shape[2] == keys
        assert isinstance(call["mask"], Segments) and call["mask"].causal


class NoReads(TorchDispatchMode):
    """Fails on a host read of device data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError("read device data on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "cohere2"])
def test_a_step_reads_nothing_on_the_host(family: str, tokens_per_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, "fastattn")
    cache = make(model, 2)
    step(model, tokens(2, 7), cache)
    cache.forget()
    monkeypatch.setattr(KVMemory, "append", lambda *args, **kwargs: None)  # without Triton it has to wait
    with NoReads():
        step(model, tokens(2, tokens_per_step), cache)


def test_lengths_are_unknown_to_the_host_after_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 16)
    wanted = expected("llama", ids)
    model = build("llama", "fastattn")
    cache = make(model, 2)
    step(model, ids[:, :6], cache)
    with monkeypatch.context() as patch:
        for module in (lengths, cache_layers, attention, lazy_mask):
            patch.setattr(module, "capturing", lambda x: True)
        assert isinstance(cache.get_seq_length(), Tensor)
        close(step(model, ids[:, 6:7], cache), wanted[:, 6:7])
        with pytest.raises(ValueError, match="before one is captured"):
            step(model, ids[:, :1], make(model, 2))
    cache.lengths.sub_(3)  # behind the host's back, as a replay
    close(step(model, ids[:, 4:5], cache), wanted[:, 4:5])
    assert int(cache.get_seq_length()) == 5, "the rows are alike still"
    cache.reset()
    close(step(model, ids[:, :9], cache), wanted[:, :9])
    cache.reset(0)
    assert cache.get_seq_length().tolist() == [[0], [9]]


def test_bad_arguments() -> None:
    config = DECODERS["gemma2"]
    with pytest.raises(ValueError, match="batch: expected an int >= 1"):
        StaticCache(config, batch=0, capacity=8, device="cpu")
    with pytest.raises(ValueError, match="capacity: expected an int >= 1"):
        StaticCache(config, batch=1, capacity=True, device="cpu")
    with pytest.raises(ValueError, match="dtype"):
        StaticCache(config, batch=1, capacity=8, dtype=torch.int32, device="cpu")
    with pytest.raises(ValueError, match='attn_implementation="fastattn"'):
        StaticCache(build("gemma2", "eager").config, batch=1, capacity=8, device="cpu")
    with pytest.raises(ValueError, match="another state than keys"):
        StaticCache(Qwen3NextConfig(num_hidden_layers=4), batch=1, capacity=8, device="cpu")
    model = build("llama", "fastattn")
    cache = make(model, 2)
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    with pytest.raises(ValueError, match=r"expected rows of 0\.\.1"):
        cache.view(1, 2)
    with pytest.raises(ValueError, match="beam_idx"):
        cache.reorder_cache(torch.zeros(3, dtype=torch.long))
    for refused in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.zeros(1))):
        with pytest.raises(ValueError, match="fixed"):
            refused()


@pytest.mark.parametrize("change", [lambda sizes: (sizes[0], sizes[1] + 0), lambda sizes: sizes[0]])
def test_a_version_that_does_not_pass_the_offset_on_is_refused(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later transformers computed with it, or asked a cache for something else."""
    model, sizes = build("gemma2", "fastattn"), Cache.get_mask_sizes
    monkeypatch.setattr(Cache, "get_mask_sizes", lambda *args, **kwargs: change(sizes(*args, **kwargs)))
    kv_cache._check_offsets.cache_clear()
    with pytest.raises(Gone, match=r"^transformers 5\.\S+ has no create_causal_mask .*: pip install (-U )?'tran"):
        make(model, 2)
    monkeypatch.undo()
    make(model, 2)


def test_models_without_windows_on_eager_and_sdpa() -> None:
    ids, mask, _ = left_padded(2, 9)
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    for implementation in ("eager", "sdpa"):
        model = build("llama", implementation)
        assert torch.equal(model.generate(**inputs, **with_cache(model, make(model, 2))), model.generate(**inputs))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # prefill in float32 asks the reference
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_one_captured_step_serves_every_length(family: str) -> None:
    ids = tokens(2, 24).cuda()
    model, eager = (build(family, implementation).cuda() for implementation in ("fastattn", "eager"))
    for each in (model, eager) if family == "gpt_oss" else ():
        each.set_experts_implementation("batched_mm")  # the one that can be captured in float32
    with torch.no_grad():
        wanted = eager(ids, **with_cache(eager, DynamicCache(config=eager.config))).logits
    cache = make(model, 2)
    token = ids[:, :1].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, token, cache)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, token, cache)
    for first in (3, 9):
        cache.reset()
        poison(cache)
        close(step(model, ids[:, :first], cache), wanted[:, :first])
        for i in range(first, 22):
            token.copy_(ids[:, i : i + 1])
            graph.replay()
            close(logits[:, 0], wanted[:, i])
        close(step(model, ids[:, 22:], cache), wanted[:, 22:])
    assert cache.lengths.tolist() == [24, 24]
