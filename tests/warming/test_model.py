"""Warming up a model: what is read from its config, and whether that is what the model then calls."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretended_gpu import PretendedGpu, pretend
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import fastattn.hf  # noqa: F401  (registers the attention)
from fastattn._compat.transformers import with_cache
from fastattn.cli.warmup import add_command
from fastattn.warming.kinds import Attention
from fastattn.warming.model import attentions_of, warmup_model
from fastattn.warming.report import Warmth

W = 24  #: sliding window
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
SLIDING = {"sliding_window": W, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}


def config(kind: str, **settings: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})


DECODERS = {
    "llama": config("Llama"),
    "mistral": config("Mistral", sliding_window=W),
    "qwen3": config("Qwen3"),
    "gemma2": config("Gemma2", **SLIDING, attn_logit_softcapping=3.0),
    "gemma3": config("Gemma3Text", **SLIDING),
    "gpt_oss": config("GptOss", **SLIDING, **EXPERTS),
    "phi3": config("Phi3", sliding_window=W),
    "cohere2": config("Cohere2", **SLIDING),
    "glm": config("Glm", partial_rotary_factor=0.5),
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_head=4, n_layer=1, vocab_size=99, n_positions=2048, attn_pdrop=0.0, dtype="bfloat16"
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=99, rotary_pct=0.5
    ),
    "deepseek_v3": config("DeepseekV3", **LATENT),
    # A window and heads of 16 in one layer, all keys and one wide head for keys and values in the other.
    "gemma4_text": config(
        "Gemma4Text",
        **SLIDING,
        global_head_dim=32,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
    ),
}
ENCODERS = {
    "bert": config("Bert"),
    "modernbert": config("ModernBert", local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "embedding_gemma2_text": config(
        "EmbeddingGemma2Text",
        **SLIDING,
        num_attention_heads=2,
        global_head_dim=32,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
    ),
}


def kinds(found: Any, training: bool = False, max_length: int = 512) -> list[Attention]:
    attentions, notes = attentions_of(found, torch.bfloat16, max_length, training)
    assert not notes
    return attentions


def test_heads_and_dims() -> None:
    for a in kinds(DECODERS["llama"]):
        assert (a.q_heads, a.kv_heads, a.head_dim, a.value_dim) == (4, 2, 16, 16)
        assert (a.masks, a.windows, a.sinks, a.softcap) == (("causal",), (None,), False, None)
    assert {phase for a in kinds(DECODERS["llama"]) for phase in a.phases} == {"prefill", "chunked", "decode"}
    assert "training" in kinds(DECODERS["llama"], training=True)[0].phases
    without = config("Llama", head_dim=None, num_key_value_heads=None)
    assert (kinds(without)[0].kv_heads, kinds(without)[0].head_dim) == (4, 16)
    latent = kinds(DECODERS["deepseek_v3"])[0]
    assert (latent.kv_heads, latent.head_dim, latent.value_dim) == (4, 32, 16)


def test_windows_are_those_of_the_layers() -> None:
    assert kinds(DECODERS["mistral"])[0].windows == (None, (W - 1, 0)), "none while all keys fit into it"
    assert set(kinds(DECODERS["gemma2"])[0].windows) == {None, (W - 1, 0)}
    assert kinds(DECODERS["mistral"], max_length=W)[0].windows == (None,), "never reached"
    assert kinds(config("Mistral", sliding_window=None))[0].windows == (None,)
    assert kinds(config("Qwen2", use_sliding_window=False, sliding_window=W))[0].windows == (None,)
    assert kinds(ENCODERS["modernbert"])[0].windows == (None, (3, 3))


def test_layers_that_differ_are_kinds_of_their_own() -> None:
    def of(found: Any) -> dict[str, set[Any]]:
        return {a.label: {(a.q_heads, a.kv_heads, a.head_dim), *a.windows} for a in kinds(found)}

    windows = {None, (W - 1, 0)}
    assert of(DECODERS["gemma4_text"]) == {
        "4/2 heads of 16": {(4, 2, 16), *windows},
        "4/1 heads of 32": {(4, 1, 32), None},
    }
    # Of the windows alone: one kind.
    each = {0: {"sliding_window": None}, 1: {"sliding_window": 3}, 2: {"sliding_window": 7}}
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    found = config("NeoMME", num_hidden_layers=3, layer_types=types, per_layer_config=each)
    (only,) = kinds(found)
    assert (only.label, only.windows) == ("", (None, (3, 3), (7, 7)))


def test_layers_that_fastattn_does_not_know_leave_the_others() -> None:
    each = {1: {"head_dim": 32}}
    types = ["full_attention", "compressed_sparse_attention", "linear_attention"]
    found = config("Qwen3", num_hidden_layers=3, layer_types=types, per_layer_config=each)
    attentions, notes = attentions_of(found, torch.bfloat16, 512)
    assert {(a.head_dim, a.label) for a in attentions} == {(16, "")}
    assert notes == ["compressed_sparse_attention: layers of this type were left out, fastattn does not know them"]


@pytest.mark.parametrize("setting, mask", [("all", None), ("vision", "causal"), (None, "causal")])
def test_bidirectional_attention_of_the_text(setting: str | None, mask: str | None) -> None:
    """ "vision" is for images within a text."""
    attentions, _ = attentions_of(
        config("Gemma4Text", use_bidirectional_attention=setting, **SLIDING), torch.bfloat16, 512
    )
    assert {a.masks for a in attentions} == {(mask,)}


def test_softcap_and_sinks() -> None:
    assert {a.softcap for a in kinds(DECODERS["gemma2"])} == {3.0}
    assert {a.softcap for a in kinds(config("Gemma2", attn_logit_softcapping=None))} == {None}
    assert {a.sinks for a in kinds(DECODERS["gpt_oss"])} == {True}


def test_encoders_see_both_ways_and_have_no_cache() -> None:
    for found in ENCODERS.values():
        for a in kinds(found):
            assert (a.masks, a.phases, a.layouts) == ((None,), ("prefill",), ("token_major",))
    assert kinds(config("Bert", is_decoder=True))[0].masks == ("causal",)


def test_an_encoder_decoder_has_three_kinds() -> None:
    bart = transformers.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=2
    )
    found = {a.label: a for a in kinds(bart)}
    assert {name: (a.masks[0], a.q_heads) for name, a in found.items()} == {
        "encoder": (None, 4),
        "decoder": ("causal", 2),
        "cross attention": (None, 2),
    }


@pytest.mark.parametrize(
    "found, sentence",
    [
        (transformers.T5Config(), "adds a bias to the scores"),
        (transformers.BloomConfig(), "compute attention themselves"),
        (config("Llama4Text", layer_types=["chunked_attention", "full_attention"]), "ready only up to one chunk"),
        (config("Qwen3", layer_types=["full_attention", "compressed_sparse_attention"]), "fastattn does not know them"),
        (transformers.LlavaConfig(), "only the text part"),
        (transformers.MambaConfig(), "compute attention themselves"),
        (transformers.BambaConfig(), "no layer of its config has an attention"),
    ],
)
def test_what_is_left_out_is_said(found: Any, sentence: str) -> None:
    _, notes = attentions_of(found, torch.bfloat16, 512)
    assert any(sentence in note for note in notes)


def text_of(found: Any) -> str:
    return str(warmup_model(found, device="cpu", max_length=64, progress=False))


def test_the_report_names_families_and_what_was_left_out() -> None:
    assert "prefill, causal, window 23,0, batch 1" in text_of(DECODERS["mistral"])
    assert "runs on the slow reference" in text_of(DECODERS["gemma2"]), "softcap, on the CPU"
    assert "Note: t5: adds a bias" in text_of(transformers.T5Config())
    untyped = text_of(config("Llama", dtype=None))
    assert "the config names no dtype: torch.float32 was made ready" in untyped
    short = str(warmup_model(config("Llama", max_position_embeddings=32), device="cpu", progress=False))
    assert "max_length is 32" in short


def passes(model: Any, batch: int, length: int) -> None:
    """What a model does: prefill, prefill in chunks, decoding, with both caches; no cache; training."""

    def ids(count: int) -> torch.Tensor:
        return torch.randint(3, 99, (batch, count))

    with torch.inference_mode():
        causal = model.config.model_type not in ENCODERS
        if not causal:
            model(ids(length))
        for cache in (
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=2 * length + 9),
        ):
            for count in (length, length // 2, 1, 1) if causal else ():
                model(ids(count), **with_cache(model, cache), use_cache=True)
    for use_cache in (False, True) if causal else (False,):
        model(ids(length), **({"use_cache": use_cache} if causal else {}))[0].float().sum().backward()


@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")  # softcap, on the reference
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_model_calls_nothing_that_was_not_made_ready(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (DECODERS | ENCODERS)[name]
    auto = AutoModelForCausalLM if name in DECODERS else AutoModel
    model = auto.from_config(found, attn_implementation="fastattn", dtype=torch.bfloat16).eval()
    gpu: PretendedGpu = pretend(monkeypatch)
    warmup_model(found, batch_sizes=(1, 2), max_length=300, training=True, device="cpu", progress=False)
    plans, kernels = gpu.plans, gpu.kernels
    assert plans or name == "gemma2"
    gpu.clear()
    for batch, length in itertools.product((1, 2), (5, 130, 201)):
        passes(model, batch, length)
    assert gpu.problems and gpu.plans <= plans
    assert gpu.kernels <= kernels


def command(line: str) -> int:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    arguments = parser.parse_args(line.split())
    return int(arguments.run(arguments))


def test_the_command_reads_nothing_but_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config("Qwen3", dtype="float32").save_pretrained(tmp_path)
    line = f"warmup --model {tmp_path} --batch-sizes 1,2 --max-length 40 --training --device cpu"
    assert command(line) == 0
    out, err = capsys.readouterr()
    assert "training, causal, batch 2" in out and "nothing to build" in out
    assert err.startswith("[1/8] prefill, causal, batch 1")
    assert command(f"{line} --no-progress") == 0
    assert capsys.readouterr().err == ""
    assert command("warmup --model tiny --max-length 40 --device cpu --no-progress --dtype bf16") == 0


def test_the_command_s_status_says_when_something_could_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "warmup --model tiny --max-length 40 --device cpu --no-progress"
    monkeypatch.setenv("FASTATTN_BACKENDS", "reference")
    assert command(line) == 1


def test_the_command_s_arguments_reach_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "fastattn.warming.model.warm", lambda *args, **kwargs: seen.append((args, kwargs)) or Warmth("cpu", (), (), 0.0)
    )
    command("warmup --model tiny --batch-sizes 3,5 --max-length 77 --dtype fp16 --device cpu --no-progress --training")
    (args, kwargs) = seen[0]
    assert (kwargs["batch_sizes"], kwargs["max_length"], kwargs["progress"]) == ((3, 5), 77, False)
    assert args[0][0].dtype == torch.float16 and "training" in args[0][0].phases


@pytest.mark.parametrize(
    "line, message",
    [
        ("--model nowhere --device cpu", "model: expected a directory with a config.json, or one of the presets"),
        ("--model tiny --device cpu --max-length 0", "max_length: "),
        ("--model tiny --device cpu --batch-sizes 0", "batch_sizes: "),
        ("--model tiny --device gpu", "device: "),
    ],
)
def test_errors_of_the_command(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(f"warmup {line}")


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON file"):
        warmup_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')
    with pytest.raises(ValueError, match=r"config\.json: expected the config of a model transformers knows"):
        warmup_model(tmp_path, device="cpu")
