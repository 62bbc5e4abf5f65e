"""Every kind of model has the tokens of its own forward passes, on the runner it gets, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import SIZES, VOCABULARY, generated, loaded, made, prompt, tokens_of, whole
from torch import nn

from fastattn.lm import make_engine, make_runner
from fastattn.lm.verification import ReferenceLogits

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": None}
_MAMBA = {**_SMALL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 0, "pad_token_id": None}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 24,
}
#: name -> (config, attention, the runner that takes it)
MODELS: dict[str, tuple[Any, str, str]] = {
    "a state of its own": (
        lambda: hf.RwkvConfig(
            **_SMALL, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48,
            context_length=256, bos_token_id=0,
        ),
        "eager",
        "PerRowRunner",
    ),
    "no state": (
        lambda: hf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4),
        "eager",
        "RecomputeRunner",
    ),
    "a recurrence": (lambda: hf.MambaConfig(**_MAMBA), "eager", "PerRowRunner"),
    "a cache of its own kind": (
        lambda: hf.MiniMaxConfig(
            **SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8, block_size=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "eager",
        "PerRowRunner",
    ),
    "positions only as generate gives them": (
        lambda: hf.BambaConfig(
            **SIZES, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1],
        ),
        "eager",
        "PerRowRunner",
    ),
    "a state in its modules": (
        lambda: hf.RecurrentGemmaConfig(
            **{**SIZES, "num_key_value_heads": 1, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16,
            head_dim=8,
        ),
        "eager",
        "RecomputeRunner",
    ),
    "positions that begin elsewhere": (
        lambda: hf.RobertaConfig(**{**SIZES, "pad_token_id": 1}, is_decoder=True), "fastattn", "PerRowRunner",
    ),
    "a window that its layers ignore, fused": (
        lambda: hf.LlamaConfig(**SIZES, sliding_window=8), "fastattn", "FusedRunner",
    ),
    "a window that its layers ignore, modules": (
        lambda: hf.GemmaConfig(**SIZES, head_dim=8, sliding_window=8), "fastattn", "ModuleRunner",
    ),
    "a window that its layers ignore, loop": (
        lambda: hf.LlamaConfig(**SIZES, sliding_window=8), "eager", "PerRowRunner",
    ),
    "a window that its layers honour, fused": (
        lambda: hf.MistralConfig(**SIZES, sliding_window=8), "fastattn", "FusedRunner",
    ),
    "a window that its layers honour, modules": (
        lambda: hf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8), "fastattn",
        "ModuleRunner",
    ),
    "a window that its layers honour, loop": (
        lambda: hf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8), "eager",
        "PerRowRunner",
    ),
    "chunks": (
        lambda: hf.Llama4TextConfig(
            **SIZES, attention_chunk_size=8, head_dim=8, num_local_experts=2, intermediate_size_mlp=32,
            layer_types=["chunked_attention", "full_attention"],
        ),
        "fastattn",
        "PerRowRunner",
    ),
    "scaled embeddings and logits": (
        lambda: hf.GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.5),
        "fastattn",
        "ModuleRunner",
    ),
    "longrope": (
        lambda: hf.Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=LONGROPE), "fastattn",
        "PerRowRunner",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_has_the_tokens_of_forward_passes(name: str) -> None:
    """Prompts of very different lengths in two rows, the third in one that held another: over windows and lengths."""
    make, attn, runner = MODELS[name]
    prompts = [prompt(14, 1), prompt(3, 2), prompt(40, 3)]
    engine = make_engine(loaded(made(make(), attn)), 2, 64)
    # transformers 5.4 keeps the state of some models in ways that only the slowest runner is right about.
    allowed = {runner, "RecomputeRunner"} if hf.__version__.startswith("5.4.") else {runner}
    assert type(engine.runner).__name__ in allowed
    eager = made(make(), "eager")
    assert tokens_of(engine, prompts, 18) == [whole(eager, ids, 18) for ids in prompts]


@pytest.mark.parametrize("step", [4, 1000])
def test_a_prompt_in_steps_crosses_the_original_length(step: int) -> None:
    config = hf.Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=LONGROPE)
    ids = prompt(50, 7)
    found = tokens_of(make_engine(loaded(made(config)), 1, 64, prefill_step=step), [ids], 8)
    assert found == [generated(made(config, "eager"), ids, 8)]


def test_longrope_within_its_original_length_runs_in_rows() -> None:
    config = hf.Phi3Config(**SIZES, original_max_position_embeddings=24, rope_parameters=LONGROPE)
    runner = make_runner(loaded(made(config)), 2, 24)
    assert type(runner).__name__ == "ModuleRunner"


def test_dynamic_positions_in_a_batch_are_those_of_each_row_alone() -> None:
    """They grow with the longest text that the rotary module has seen, whichever it was."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 24}, rope_parameters=rope)
    prompts = [prompt(60, 1), prompt(5, 2), prompt(30, 3)]
    engine = make_engine(loaded(made(config)), 2, 96)
    for _ in range(2):  # what the first turn left in the model is not seen by the second
        assert tokens_of(engine, prompts, 25) == [generated(made(config, "eager"), ids, 25) for ids in prompts]


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: hf.BertConfig(**SIZES), "depend on the tokens that follow"),
        (lambda: hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48), "that follow"),
        (
            lambda: hf.ReformerConfig(
                **_SMALL, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
                is_decoder=True, axial_pos_embds=False, max_position_embeddings=512, attn_layers=["local", "lsh"],
                local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=4,
            ),
            "other logits of a long text each time",
        ),
    ],
    ids=["an encoder", "permuted", "hashed"],
)  # fmt: skip
def test_what_continues_no_text_is_refused(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_engine(loaded(made(make(), "eager")), 1, 64)


def test_an_encoder_with_small_weights_is_refused_too() -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.BertConfig(**SIZES), attn_implementation="eager").eval()
    with pytest.raises(ValueError, match="depend on the tokens that follow"):
        ReferenceLogits(model)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = made(hf.LlamaConfig(**SIZES))
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        make_engine(loaded(model), 1, 64)


class _Wrong(nn.Module):
    """A layer that computes something else when it has a cache."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attention_type = layer, getattr(layer, "attention_type", None)

    def forward(self, x: Any, *arguments: Any, **options: Any) -> Any:
        found = self.layer(x, *arguments, **options)
        return (
            found.roll(1, -1)
            if options.get("cache") is not None or options.get("past_key_values") is not None
            else found
        )


def test_a_wrong_state_is_detected() -> None:
    """Without a cache the model is right, so it runs without one."""
    model = made(hf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8))
    model.model.layers[1] = _Wrong(model.model.layers[1])
    engine = make_engine(loaded(model), 2, 64)
    assert type(engine.runner).__name__ == "RecomputeRunner"
    ids = prompt(9)
    assert tokens_of(engine, [ids], 6) == [whole(model, ids, 6, use_cache=False)]


@pytest.mark.parametrize(
    "rope, most",
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "default"}, 64),
        # published with the length that it reaches
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_factors_count_in_the_models_length(rope: dict[str, Any], most: int) -> None:
    sizes = {**SIZES, "max_position_embeddings": 64}
    make = lambda: hf.Qwen2Config(**sizes, rope_parameters={"rope_theta": 1e4, **rope})  # noqa: E731
    engine = make_engine(loaded(made(make())), 1, 10**6)
    assert engine.runner.capacity == most
    ids = prompt(most - 8)
    assert tokens_of(engine, [ids], 6) == [generated(made(make(), "eager"), ids, 6)]


@pytest.mark.parametrize("attn", ["fastattn", "eager"])
@pytest.mark.parametrize("step, widest", [(16, 64), (100, 128)])  # fused layers round up to 64
def test_the_prefill_step_is_obeyed(attn: str, step: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(loaded(made(hf.LlamaConfig(**SIZES), attn)), 1, 200, prefill_step=step)
    embed, seen = torch.nn.functional.embedding, []

    def spy(ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(ids.numel())
        return embed(ids, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "embedding", spy)
    ids = prompt(180)
    tokens = tokens_of(engine, [ids], 2)
    monkeypatch.undo()
    assert tokens == [whole(made(hf.LlamaConfig(**SIZES), "eager"), ids, 2)]
    assert step <= max(seen) <= widest
    assert len(seen) >= 180 // (step + step // 4)
