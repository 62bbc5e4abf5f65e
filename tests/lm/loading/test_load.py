import json
from functools import lru_cache

import pytest
import torch
import transformers
from torch.utils import _device

from fastattn.cli import main as cli
from fastattn.lm import load, set_attention
from fastattn.lm.loading.device import pick_device
from fastattn.lm.loading.presets import PRESETS


@pytest.mark.parametrize(
    "name, parameters", [("tiny", 1_705_216), ("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)]
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name, factor, dim", [("llama-3.2-1b", 32.0, 64), ("llama-3.1-8b", 8.0, 128)])
def test_presets_have_the_published_rotary_embedding(name, factor, dim):
    config = transformers.LlamaConfig(**PRESETS[name])
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500000.0, factor)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, dim)


def test_preset_is_ready_and_its_weights_are_random():
    loaded = load("tiny", attn="sdpa")
    assert (loaded.name, loaded.tokenizer, loaded.model.training) == ("tiny", None, False)
    for name, p in loaded.model.named_parameters():
        if "norm" not in name:
            assert 0.015 < p.std().item() < 0.025, name
    assert loaded.model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_seed_decides_the_weights_and_leaves_torchs_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (load("tiny", attn="sdpa", device="cpu", seed=seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_dtype_is_taken(saved_model):
    assert load("tiny", attn="sdpa", dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16
    assert load(saved_model, attn="sdpa", dtype=torch.float16, device="cpu").model.dtype == torch.float16
    assert load(saved_model, attn="sdpa", device="cpu").model.dtype == torch.float32  # as saved


def test_directory_gives_the_saved_model_and_its_tokenizer(saved_model):
    original = load("tiny", attn="eager", device="cpu", dtype=torch.float32, seed=3).model
    loaded = load(saved_model, attn="eager", device="cpu")
    assert loaded.name == "saved-tiny"
    assert loaded.tokenizer("b a b")["input_ids"] == [2, 1, 2]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(ids).logits, original(ids).logits)


def test_loading_leaves_torchs_devices_alone(saved_model, monkeypatch):
    """transformers' from_pretrained replaces torch.linspace while torch may be making, once in a process, its list of
    the functions that a device redirects. `load` sees to it that the list is there before."""
    monkeypatch.setattr(_device, "_device_constructors", lru_cache(1)(_device._device_constructors.__wrapped__))
    load(saved_model, attn="eager", device="cpu")
    with torch.device("meta"):
        assert torch.linspace(0, 1, 3).is_meta


def test_directory_runs_in_the_benchmark(saved_model, capsys):
    line = f"benchmark --model {saved_model} --device cpu -p 9 -g 2 -n 1 --attn sdpa"
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Model saved-tiny: 1.71e6 parameters (its own weights), float32, on the CPU\n")
    assert err == ""  # no progress bar: this is no terminal


def test_directory_in_shards(saved_model, model_directory):
    (model_directory / "model.safetensors").unlink()
    load(saved_model, attn="eager", device="cpu").model.save_pretrained(model_directory, max_shard_size="2MB")
    shards = sorted(model_directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(model_directory, attn="eager", device="cpu")
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"{shards[-1].name}: not found"):
        load(model_directory)


def test_unknown_model_lists_the_presets(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"model: expected a directory .*tiny, llama-3.2-1b, llama-3.1-8b, gemma-2-2b, gemma-4, gpt2, got 'nope'",
    ):
        load("nope")
    with pytest.raises(ValueError, match="model: expected a directory"):
        load(tmp_path / "not-there")


def _truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def _edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def _drop_a_tensor(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "config.json").unlink(), r"config\.json: not found"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json: expected a JSON file"),
        (lambda p: (p / "config.json").write_text("[]"), r"config\.json: expected a JSON object, got list"),
        (
            lambda p: _edit_config(p, model_type="nope"),
            r"config\.json: expected the config of a model transformers kno",
        ),
        (lambda p: _edit_config(p, model_type="t5"), "cannot be loaded as a causal language model"),
        (
            lambda p: _edit_config(p, intermediate_size=500),
            r"model\.safetensors: model\.layers\.0\.mlp\.down_proj\.weight: expected shape \[256, 500\]",
        ),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: not found"),
        (_truncate, r"model\.safetensors: expected a whole safetensors file, this one is damaged"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "this one is damaged"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 4096), "this one is damaged"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "expected a weight_map"),
        (_drop_a_tensor, r"expected weights for every parameter, 1 are missing: model\.layers\.1\.self_attn\.q_proj"),
        (_no_tokenizer, "expected a tokenizer"),
        (lambda p: (p / "tokenizer.json").write_text("{"), "expected a tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_directory_is_one_line_naming_the_path(model_directory, damage, message):
    damage(model_directory)
    with pytest.raises(ValueError, match=message) as caught:
        load(model_directory, attn="eager", device="cpu")
    assert str(model_directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_attention():
    with pytest.raises(ValueError, match=r"attn: expected one of eager, fastattn, .*sdpa, got 'nope'"):
        load("tiny", attn="nope")


@pytest.mark.parametrize("device", ["nope", "meta", "cpu:x", "cuda:99"])
def test_unknown_device(device):
    with pytest.raises(ValueError, match="device: "):
        pick_device(device)


@pytest.mark.parametrize("attn", ["sdpa", "eager", "fastattn"])
def test_attention_can_be_switched_on_a_loaded_model(attn):
    loaded = load("tiny", attn="eager", device="cpu", dtype=torch.float32)
    ids = torch.randint(1024, (2, 33))
    expected = loaded.model(ids).logits
    set_attention(loaded.model, attn)
    assert loaded.model.config._attn_implementation == attn
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_that_is_not_installed_is_one_line():
    loaded = load("tiny", attn="eager", device="cpu")
    if transformers.utils.is_flash_attn_2_available() or transformers.utils.is_kernels_available():
        pytest.skip("flash_attention_2 can be had here")
    with pytest.raises(ValueError, match="attn: flash_attention_2 cannot be used here"):
        set_attention(loaded.model, "flash_attention_2")
