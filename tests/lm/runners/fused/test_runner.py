"""`FusedRunner` against transformers' own layers: the same weights, the same logits."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported
pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastattn.lm.runners.fused import FusedRunner

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that who attends to whom shows in the logits
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(
        **SIZES, rope_parameters=LLAMA_3 | {"original_max_position_embeddings": 32}, tie_word_embeddings=True
    ),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**{**SIZES, "hidden_size": 32}),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, windows": Qwen3Config(
        **SIZES, use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"]
    ),
}
CAPACITY = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def model_of(config: PreTrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    for name, parameter in model.named_parameters():  # ones and zeros would hide a norm or a bias left out
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().to(device)


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """What transformers makes of a sequence: logits `[V]` after its last token."""
    return model(torch.tensor([ids], device=model.device)).logits[0, -1].float()


def draw(count: int) -> list[int]:
    return torch.randint(SIZES["vocab_size"], (count,)).tolist()


@pytest.fixture(params=["torch", "kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both ways: torch's operations, and the kernels in Triton's interpreter."""
    if request.param == "kernels" and not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("kernels")
def test_rows_of_their_own_lengths(name: str, device: str) -> None:
    model = model_of(CONFIGS[name], device)
    held = [draw(9), draw(1), draw(4)]
    expected = [logits_of(model, ids) for ids in held]
    found = FusedRunner(model, rows=3, capacity=CAPACITY, prefill_step=4)
    for row, (ids, truth) in enumerate(zip(held, expected, strict=True)):
        after = found.prefill(row, torch.tensor(ids, device=device))
        torch.testing.assert_close(after.float(), truth, rtol=1e-4, atol=1e-4)
    for count in (3, 1, 2, 3):  # buckets of fewer rows leave the others as they are
        new = draw(count)
        after = found.decode(torch.tensor(new, device=device))
        assert after.shape == (count, found.vocab_size)
        for row, token in enumerate(new):
            held[row].append(token)
            torch.testing.assert_close(after[row].float(), logits_of(model, held[row]), rtol=1e-4, atol=1e-4)
    more = draw(6)  # a second turn
    held[1] += more
    after = found.prefill(1, torch.tensor(more, device=device))
    torch.testing.assert_close(after.float(), logits_of(model, held[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_cleared_and_moved(device: str) -> None:
    model = model_of(CONFIGS["llama"], device)
    found = FusedRunner(model, rows=3, capacity=CAPACITY)
    first, second, third = draw(7), draw(5), draw(6)
    for row, ids in enumerate((first, second, third)):
        found.prefill(row, torch.tensor(ids, device=device))
    found.move(2, 0)
    token = draw(1)
    after = found.decode(torch.tensor(token * 2, device=device))
    torch.testing.assert_close(after[0], logits_of(model, third + token), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1], logits_of(model, second + token), rtol=1e-4, atol=1e-4)
    found.clear(1)
    found.decode(torch.tensor(draw(2), device=device))  # the empty row takes part, and counts
    after = found.prefill(1, torch.tensor(first, device=device))
    torch.testing.assert_close(after, logits_of(model, first), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("kernels")
def test_a_full_row_harms_no_other(device: str) -> None:
    model = model_of(CONFIGS["llama"], device)
    found = FusedRunner(model, rows=2, capacity=8)
    full, other = draw(8), draw(3)
    found.prefill(0, torch.tensor(full, device=device))
    found.prefill(1, torch.tensor(other, device=device))
    for _ in range(3):
        token = draw(1)
        other += token
        after = found.decode(torch.tensor([5, *token], device=device))
        assert after.isfinite().all()
    torch.testing.assert_close(after[1], logits_of(model, other), rtol=1e-4, atol=1e-4)


def test_the_model_shares_its_weights_with_the_runner() -> None:
    model = model_of(CONFIGS["qwen2"])
    ids = draw(5)
    before = logits_of(model, ids)
    one = FusedRunner(model, rows=1, capacity=8)
    torch.testing.assert_close(logits_of(model, ids), before)
    attention = model.model.layers[0].self_attn
    memory = attention.q_proj.weight.untyped_storage().data_ptr()
    assert memory == attention.v_proj.weight.untyped_storage().data_ptr()
    two = FusedRunner(model, rows=2, capacity=16)  # nothing is merged twice
    assert attention.q_proj.weight.untyped_storage().data_ptr() == memory
    torch.testing.assert_close(two.prefill(0, torch.tensor(ids)), one.prefill(0, torch.tensor(ids)))
    torch.testing.assert_close(two.prefill(1, torch.tensor(ids)), before, rtol=1e-4, atol=1e-4)


def _gelu(model: Any) -> None:
    model.config.hidden_act = "gelu"


def _dynamic(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def _quantized(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = torch.nn.Identity()


def _mixed(model: Any) -> None:
    model.lm_head.to(torch.float64)


@pytest.mark.parametrize(
    "change, match", [(_gelu, "silu"), (_dynamic, "dynamic"), (_quantized, "Identity"), (_mixed, "float64")]
)
def test_models_of_another_kind_are_refused(change: Callable[[Any], None], match: str) -> None:
    model = model_of(CONFIGS["llama"])
    change(model)
    with pytest.raises(ValueError, match=match):
        FusedRunner(model, rows=1, capacity=8)


def test_other_families_are_refused() -> None:
    with pytest.raises(ValueError, match="gemma2"):
        FusedRunner(model_of(Gemma2Config(**SIZES)), rows=1, capacity=8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("count", [1, 3])
def test_one_captured_step_serves_every_length(name: str, count: int) -> None:
    model = model_of(CONFIGS[name], "cuda", torch.bfloat16)
    wide = copy.deepcopy(model).float()
    found = FusedRunner(model, rows=4, capacity=CAPACITY)
    ids = torch.zeros(count, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.decode(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            after = found.decode(ids)
    torch.cuda.current_stream().wait_stream(stream)
    held = [draw(1 + 7 * row) for row in range(count)]
    for row, prompt in enumerate(held):
        found.clear(row)
        found.prefill(row, torch.tensor(prompt, device="cuda"))
    for _ in range(6):
        new = draw(count)
        ids.copy_(torch.tensor(new))
        graph.replay()
        for row, token in enumerate(new):
            held[row].append(token)
            truth = logits_of(wide, held[row])
            # In bfloat16, with large weights; another length, or another row's keys, would be off by all and more.
            assert (after[row].float() - truth).norm() < 0.1 * truth.norm(), (row, len(held[row]))
