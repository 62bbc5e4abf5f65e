"""Ways of calling a model that one forward does not show: each gives what eager gives."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from sweep import models, registry
from sweep.checks import cache_name, cache_of, gradients, in_steps, outputs, pad_mask, select
from sweep.compare import TOLERANCE, Result, difference, floats
from sweep.inputs import BATCH, LENGTH, tokens
from sweep.shrink import shrink
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import fastattn.hf  # noqa: F401  (registers "fastattn")

#: Plain causal; windows and softcap in every other layer; sinks and windows; chunks; an own window in every layer.
FAMILIES = ("llama", "gemma2", "gpt_oss", "llama4_text", "mistral")
families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model(family: str, attention: str) -> PreTrainedModel:
    unit = next(unit for unit in registry.units() if unit.name == f"{family}/causal")
    return models.build(unit.model, shrink(unit.default_config(), "tiny"), attention)


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return model(family, "eager"), model(family, "fastattn")


def same(expected: Result | Tensor, found: Result | Tensor) -> None:
    if isinstance(expected, Tensor):
        expected = {"tensor": expected}
    if isinstance(found, Tensor):
        found = {"tensor": found}
    error, where = difference(expected, found)
    assert error <= TOLERANCE, where


def tree(length: int) -> Tensor:
    """bool [B, 1, S, S]: each token sees itself and some of those before it."""
    seen = torch.rand(BATCH, 1, length, length) < 0.5
    return (seen | torch.eye(length, dtype=torch.bool)).tril()


@families
def test_masks_made_by_the_caller(family: str) -> None:
    """eager would add a bool mask to the scores as 0 and 1: what it means is what the additive one says."""
    eager, fast = pair(family)
    ids, seen = tokens(), tree(LENGTH)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    position = torch.arange(LENGTH).expand(BATCH, -1)
    expected = outputs(eager, input_ids=ids, attention_mask=additive, position_ids=position)
    same(expected, outputs(fast, input_ids=ids, attention_mask=additive, position_ids=position))
    same(expected, outputs(fast, input_ids=ids, attention_mask=seen, position_ids=position))


@families
def test_a_tree_of_drafts_over_a_cache(family: str) -> None:
    """Several continuations at once, each token seeing the cache and its own branch."""
    eager, fast = pair(family)
    ids, seen = tokens(12), torch.ones(BATCH, 1, 4, 12, dtype=torch.bool)
    seen[..., 8:] = tree(4)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    found = []
    for one in (eager, fast):
        with torch.no_grad():
            cache = cache_of(one(input_ids=ids[:, :8], use_cache=True, **{cache_name(one): DynamicCache()}))
            out = one(input_ids=ids[:, 8:], attention_mask=additive, **{cache_name(one): cache})
        found.append(floats(out))
    same(*found)


@families
def test_sequences_packed_by_their_positions(family: str) -> None:
    eager, fast = pair(family)
    position = torch.cat([torch.arange(n) for n in (5, 8, 1)])[None].expand(BATCH, -1)
    inputs = {"input_ids": tokens(), "position_ids": position, "use_cache": False}
    same(outputs(eager, **inputs), outputs(fast, **inputs))


@families
def test_embeddings_in_place_of_tokens(family: str) -> None:
    eager, fast = pair(family)
    values, mask = eager.get_input_embeddings()(tokens()).detach(), pad_mask("left")
    inputs = {"inputs_embeds": values, "attention_mask": mask}
    same(select(outputs(eager, **inputs), mask), select(outputs(fast, **inputs), mask))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "without a config", "static"])
@families
def test_caches(family: str, kind: str, padded: bool) -> None:
    inputs, mask = {"input_ids": tokens()}, pad_mask("left") if padded else None
    found = []
    for one in pair(family):
        caches = {
            "dynamic": lambda one=one: DynamicCache(config=one.config),
            "without a config": DynamicCache,
            "static": lambda one=one: StaticCache(config=one.config, max_cache_len=LENGTH + 6),
        }
        found.append(in_steps(one, inputs, [6, 1, 4, 3], mask, caches[kind]()))
    same(*found)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_that_was_cropped(family: str) -> None:
    ids, found = tokens(), []
    for one in pair(family):
        cache = DynamicCache()
        with torch.no_grad():
            one(input_ids=ids[:, :9], **{cache_name(one): cache})
            cache.crop(-3)
            out = one(input_ids=ids[:, 9:12], **{cache_name(one): cache})
        found.append(floats(out))
    same(*found)


@families
def test_two_turns_of_a_padded_batch(family: str) -> None:
    """The second question comes padded too, amid the sequence."""
    ids, mask = tokens(LENGTH + 6), pad_mask("left", LENGTH + 6)
    mask[0, LENGTH : LENGTH + 2] = 0
    same(*(in_steps(one, {"input_ids": ids}, [LENGTH, 6], mask, DynamicCache()) for one in pair(family)))


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"use_cache": False},
        "an assistant",
    ],
    ids=str,
)
@families
def test_ways_to_generate(family: str, how: dict[str, Any] | str) -> None:
    ids, mask = tokens(), pad_mask("left")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": how == {"use_cache": False}}
    if how == "an assistant" or "prompt_lookup_num_tokens" in how:
        ids, mask = ids[:1], mask[:1]
    found = []
    for one in pair(family):
        options = {"assistant_model": copy.deepcopy(one)} if how == "an assistant" else how
        try:
            found.append(one.generate(input_ids=ids, attention_mask=mask, **settings, **options, disable_compile=True))
        except Exception as e:
            if one is model(family, "eager"):
                pytest.skip(f"eager cannot do it: {e}")
            raise
    sequences = [one if isinstance(one, Tensor) else one.sequences for one in found]
    assert torch.equal(*sequences)


@families
def test_gradient_checkpointing(family: str) -> None:
    eager, fast = pair(family)
    mask = pad_mask("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = gradients(eager, inputs, mask)
    one = copy.deepcopy(fast).train()
    one.gradient_checkpointing_enable()
    same(expected, gradients(one, {**inputs, "use_cache": False}, mask))


@families
def test_an_implementation_chosen_later(family: str) -> None:
    eager, _ = pair(family)
    one, mask = copy.deepcopy(eager), pad_mask("left")
    one.set_attn_implementation("fastattn")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    expected = outputs(eager, **inputs)
    same(select(expected, mask), select(outputs(one, **inputs), mask))
    one.set_attn_implementation("eager")
    same(expected, outputs(one, **inputs))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_compiled_forward(family: str) -> None:
    eager, fast = pair(family)
    torch._dynamo.reset()
    compiled, mask = torch.compile(fast, backend="aot_eager"), pad_mask("left")
    for inputs in ({"input_ids": tokens()}, {"input_ids": tokens(), "attention_mask": mask}):
        expected = outputs(eager, **inputs)
        with torch.no_grad():
            found = floats(compiled(**inputs))
        real = inputs.get("attention_mask", torch.ones_like(mask))
        same(select(expected, real), select(found, real))
    torch._dynamo.reset()


@pytest.mark.slow
def test_export_with_a_length_that_varies() -> None:
    eager, fast = pair("llama")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fast

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        Logits(), (tokens(), pad_mask("left")), dynamic_shapes=({1: length}, {1: length}), strict=False
    )
    ids, mask = tokens(20), pad_mask("left", 20)
    expected = select(outputs(eager, input_ids=ids, attention_mask=mask, use_cache=False), mask)
    found = program.module()(ids, mask)
    same(expected["logits"], found[mask.bool()].detach())
