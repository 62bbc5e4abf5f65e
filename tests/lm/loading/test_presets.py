"""The preset of Gemma 4, whose layers differ: windows with one head dim, then all keys with another one."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from fastattn.cli import main as cli
from fastattn.lm.loading.presets import PRESETS, preset_config

needs_gemma_4 = pytest.mark.skipif(
    "gemma4_text" not in transformers.CONFIG_MAPPING, reason="this transformers has no Gemma 4"
)
LAYERS = [*["sliding_attention"] * 5, "full_attention"]


@needs_gemma_4
def test_gemma_4_has_the_sizes_that_transformers_gives_it() -> None:
    config, default = preset_config("gemma-4"), transformers.CONFIG_MAPPING["gemma4_text"]()
    assert config.to_dict() == default.to_dict()
    assert config.layer_types == LAYERS * 5 and config.sliding_window == 512
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    dims = [layer.self_attn.q_proj.out_features // config.num_attention_heads for layer in model.model.layers]
    assert dims == [*[256] * 5, 512] * 5


@needs_gemma_4
def test_its_layers_run_in_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small, with more tokens than a window has keys."""
    sizes = {"vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "hidden_size": 64}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32, "global_head_dim": 64, "sliding_window": 16}
    monkeypatch.setitem(PRESETS, "gemma-4", PRESETS["gemma-4"] | sizes)
    file = tmp_path / "found.json"
    line = "benchmark --model gemma-4 -p 40 -g 4 -n 1 --attn fastattn,sdpa --device cpu --json"
    assert cli.main([*line.split(), str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["model"]["type"] == "gemma4_text" and found["model"]["head_dim"] is None, "it differs between layers"
    assert (found["model"]["num_hidden_layers"], found["model"]["num_key_value_heads"]) == (6, 1)
    for name, entry in found["implementations"].items():
        assert entry["averages"]["generation_tps"] > 0, name
    assert "[fastattn] Served by:" in capsys.readouterr().out


def test_a_family_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "gemma-4", {"model_type": "of tomorrow"})
    with pytest.raises(ValueError, match=r"model: gemma-4 needs a newer transformers, .* has no of tomorrow"):
        preset_config("gemma-4")
