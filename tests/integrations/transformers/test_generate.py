"""Whole models: greedy text, saving and loading, training, torch.compile."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, build, left_padded, static_cache, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, PreTrainedModel

from fastattn import FastattnWarning
from fastattn._compat.transformers import with_cache
from fastattn.common.notice import _given
from fastattn.counters import stats

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generate(family: str, cache: str) -> None:
    ids, mask, _ = left_padded(2, 11)
    settings = {**GREEDY, "input_ids": ids, "attention_mask": mask}
    settings["cache_implementation"] = cache
    try:
        expected = build(family, "eager").generate(**settings)
    except TypeError as error:
        if (family, cache) != ("llama4", "static"):  # in transformers 5.17
            raise
        pytest.skip(f"this transformers cannot do it itself: {error}")
    found = build(family, "fastattn").generate(**settings)
    assert torch.equal(found, expected)


def test_chunked_prefill_no_cache_and_beam_search() -> None:
    model, eager = build("gemma2", "fastattn"), build("gemma2", "eager")
    ids = tokens(1, 12)
    expected = eager.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=5), expected)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), expected)
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), eager.generate(ids, **beams))


def test_save_and_load(tmp_path: Path) -> None:
    ids = tokens(2, 9)
    model = build("mistral", "fastattn")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn").eval()
    assert loaded.config._attn_implementation == "fastattn"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # the file does not insist on fastattn
    assert other.config._attn_implementation == "sdpa"
    other.set_attn_implementation("fastattn")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    with torch.device("meta"):
        assert torch.linspace(0, 1, 3).is_meta  # see pytest_configure: else later tests get tensors on other devices


def test_every_layer_calls_fastattn() -> None:
    before = sum(stats()["calls"].values())
    with torch.no_grad():
        build("llama", "fastattn")(tokens(1, 8))
    assert sum(stats()["calls"].values()) - before == DECODERS["llama"].num_hidden_layers


def test_a_model_that_computes_its_own_attention() -> None:
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0)
    ids, mask, _ = left_padded(2, 9)
    inputs = {"input_ids": ids, "attention_mask": mask}
    logits = []
    _given.clear()
    for attention in ("eager", "fastattn"):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
            logits += [model(**inputs).logits, model(ids).logits]
    torch.testing.assert_close(logits[2][mask.bool()], logits[0][mask.bool()], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[3], logits[1], rtol=0, atol=1e-4)
    said = [w for w in caught if issubclass(w.category, FastattnWarning)]
    assert len(said) == 1
    assert "BloomAttention of BloomModel computes attention itself" in str(said[0].message)


def loss_and_gradients(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_training_step(family: str, padded: bool) -> None:
    ids, mask, _ = left_padded(2, 12)
    ids, mask = ids.flip(1), mask.flip(1)  # on the right: a row of left padding that sees nothing differs from eager's
    inputs = {"input_ids": ids, "labels": torch.where(mask.bool(), ids, -100)}
    if padded:
        inputs["attention_mask"] = mask
    expected_loss, expected = loss_and_gradients(build(family, "eager"), **inputs)
    loss, found = loss_and_gradients(build(family, "fastattn"), **inputs)
    torch.testing.assert_close(loss, expected_loss)
    same_gradients(found, expected)


def test_gradient_checkpointing() -> None:
    ids = tokens(2, 12)
    _, expected = loss_and_gradients(build("gemma2", "eager"), input_ids=ids, labels=ids)
    model = build("gemma2", "fastattn")
    model.gradient_checkpointing_enable()
    _, found = loss_and_gradients(model, input_ids=ids, labels=ids)
    same_gradients(found, expected)


def test_training_under_autocast() -> None:
    ids = tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected = loss_and_gradients(build("qwen3", "eager"), input_ids=ids, labels=ids)
        loss, found = loss_and_gradients(build("qwen3", "fastattn"), input_ids=ids, labels=ids)
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0.02)
    same_gradients(found, expected, tolerance=0.1)


def test_training_with_dropout() -> None:
    ids = tokens(2, 12)
    _given.clear()
    model = build("mistral", "fastattn", attention_dropout=0.5)
    with pytest.warns(FastattnWarning, match="dropout"):
        losses = [loss_and_gradients(model, input_ids=ids, labels=ids)[0] for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    with torch.no_grad():
        expected = build("mistral", "eager", attention_dropout=0.5)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)


def compiled(model: PreTrainedModel) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_forward(family: str, padded: bool) -> None:
    ids, mask, position = left_padded(2, 12)
    inputs: dict[str, Tensor] = {"input_ids": ids, "position_ids": position}
    if padded:
        inputs["attention_mask"] = mask
    with torch.no_grad():
        expected = build(family, "eager")(**inputs, use_cache=False).logits
        found = compiled(build(family, "fastattn"))(**inputs, use_cache=False).logits
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)


def test_compiled_training_step() -> None:
    ids = tokens(2, 12)
    _, expected = loss_and_gradients(build("llama", "eager"), input_ids=ids, labels=ids)
    model = build("llama", "fastattn").train()
    loss = compiled(model)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    same_gradients({name: p.grad for name, p in model.named_parameters()}, expected)


def test_compiled_decode_with_a_static_cache_is_compiled_once() -> None:
    ids = tokens(2, 10)
    position = torch.arange(10).expand(2, -1)
    model = build("llama", "fastattn")
    with torch.no_grad():
        expected = build("llama", "eager")(ids).logits
        cache = static_cache(model, 16)
        model(ids[:, :4], **with_cache(model, cache))
        step = compiled(model)
        for i in range(4, 10):
            token = ids[:, i : i + 1].clone()
            with torch._dynamo.config.patch(error_on_recompile=i > 4):
                found = step(input_ids=token, position_ids=position[:, i : i + 1].clone(), **with_cache(model, cache))
            torch.testing.assert_close(found.logits[:, 0], expected[:, i], rtol=0, atol=1e-4)


def test_inference_mode() -> None:
    ids = tokens(2, 12)
    model = build("mistral", "fastattn")
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        found = torch.cat([model(part, **with_cache(model, cache)).logits for part in ids.split(5, 1)], 1)
        expected = build("mistral", "eager")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_decode_with_a_static_cache_in_a_cuda_graph() -> None:
    model = build("llama", "fastattn").to("cuda", torch.bfloat16)
    eager = build("llama", "eager").to("cuda", torch.bfloat16)
    ids = tokens(1, 12).cuda()
    with torch.no_grad():
        expected = eager(ids).logits
        cache = static_cache(model, 32)
        model(ids[:, :4], **with_cache(model, cache))
        token, position = ids[:, 4:5].clone(), torch.tensor([[4]], device="cuda")
        lengths = [layer.cumulative_length for layer in cache.layers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(token, position_ids=position, **with_cache(model, cache))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, position_ids=position, **with_cache(model, cache)).logits
        for length in lengths:
            length.fill_(4)
        for i in range(4, 12):
            token.copy_(ids[:, i : i + 1])
            position.fill_(i)
            graph.replay()
            torch.testing.assert_close(logits[:, 0].float(), expected[:, i].float(), rtol=0, atol=0.2)
