"""Adapters: merged into the weights, with the tokens that peft's own model gives, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import SIZES, VOCABULARY, generated, made, prompt, tokens_of

from fastattn.cli import main as cli
from fastattn.lm import load, make_engine
from fastattn.lm.loading import adapters as adapters_module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "base"
    made(hf.LlamaConfig(**SIZES), "eager").save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


def written(path: Path, **options: Any) -> Any:
    """An adapter in a directory. Returns peft's model with it."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'fastattn[peft]'")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(made(hf.LlamaConfig(**SIZES), "eager"), config)
    model.save_pretrained(path)
    return model.eval()


KINDS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "v of the second layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "an mlp and the head": {"target_modules": ["up_proj", "lm_head"]},
    "magnitudes (DoRA)": {"target_modules": ["k_proj"], "use_dora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_peft_says(kind: str, base: Path, tmp_path: Path) -> None:
    model = written(tmp_path / "adapter", **KINDS[kind])
    ids = prompt(12)
    expected = generated(model, ids, 10)
    assert expected != generated(made(hf.LlamaConfig(**SIZES), "eager"), ids, 10)
    engine = make_engine(load(base, dtype=torch.float32, adapter_path=tmp_path / "adapter"), 1, 64)
    assert type(engine.runner).__name__ == "FusedRunner"  # its weights are a plain model's
    assert tokens_of(engine, [ids], 10) == [expected]


def test_one_beside_the_model_is_applied(base: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    model = written(tmp_path / "adapter", **KINDS["q and v"])
    shutil.copytree(base, both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, both)
    # The name of its base model is untrusted, and ignored.
    config = json.loads((both / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/nowhere/else"}
    (both / "adapter_config.json").write_text(json.dumps(config))
    if hf.__version__.startswith("5.4."):  # it cannot be told to leave the adapter to us: refused, not ignored
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            load(both, dtype=torch.float32)
        return
    ids = prompt(12)
    assert tokens_of(make_engine(load(both, dtype=torch.float32), 1, 64), [ids], 10) == [generated(model, ids, 10)]
    with pytest.raises(ValueError, match="expected one of the two"):
        load(both, adapter_path=tmp_path / "adapter")


def test_the_modules_keep_their_dtype(base: Path, tmp_path: Path) -> None:
    written(tmp_path / "adapter", **KINDS["whole modules"])
    found = load(base, dtype=torch.bfloat16, adapter_path=tmp_path / "adapter").model
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


def test_generate_takes_one(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "adapter", **KINDS["q and v"])
    texts = []
    for more in ([], ["--adapter-path", str(tmp_path / "adapter")]):
        assert cli.main(["generate", "--model", str(base), "--prompt", "w5 w6 w7", "-g", "8", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def _without_its_end(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _edited(**changes: Any) -> Any:
    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: x for name, x in config.items() if x is not None}))

    return change


def _weights(change: Any) -> Any:
    def do(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = path / "adapter_model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return do


DAMAGES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "not found"),
    "half of the weights": (_without_its_end, "damaged"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_path: expected a directory"),
    "no kind": (_edited(peft_type=None), "peft_type"),
    "an unknown kind": (_edited(peft_type="NEW"), "cannot be applied"),
    "modules that the model has not": (_edited(target_modules=["query"]), "cannot be applied"),
    "another rank": (_edited(r=8), "cannot be applied"),
    "a weight too few": (_weights(lambda x: x.pop(sorted(x)[0])), "lacks"),
    "a weight too many": (
        _weights(lambda x: x.update({sorted(x)[0].replace("layers.0", "layers.7"): torch.ones(2)})),
        "does not know",
    ),
    "numbers that are none": (_weights(lambda x: x[sorted(x)[0]].fill_(torch.nan)), "cannot be applied"),
    "prompts": (_edited(peft_type="PROMPT_TUNING", num_virtual_tokens=3), "cannot be"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_applied_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    written(path, **KINDS["q and v"])
    damage, why = DAMAGES[name]
    damage(path)
    with pytest.raises(ValueError, match=why) as caught:
        load(base, adapter_path=path)
    assert "\n" not in str(caught.value)


def test_an_adapter_alone_is_no_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="holds an adapter and no model"):
        load(tmp_path)


def test_without_peft_it_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model too: a model without its adapter is another one."""
    from safetensors.torch import save_file

    both = shutil.copytree(base, tmp_path / "both")
    (both / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.ones(1)}, both / "adapter_model.safetensors")
    monkeypatch.setattr(adapters_module, "find_spec", lambda name: None)
    for options in ({}, {"adapter_path": both}):
        with pytest.raises(ImportError, match="adapters need peft"):
            load(both, **options)


@pytest.mark.parametrize("value", [3, "/nowhere"])
def test_bad_paths(base: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="adapter_path: expected a directory"):
        load(base, adapter_path=value)
