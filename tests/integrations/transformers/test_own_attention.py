"""Models whose layers do not call the attention that their config names: eager's result, and a warning that says so."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers "fastattn", quietly)
import torch
from transformers import (
    AutoModel,
    BarkCoarseConfig,
    BloomConfig,
    Data2VecVisionConfig,
    DebertaConfig,
    FalconConfig,
    Gemma3nAudioConfig,
    GPTNeoConfig,
    LlamaConfig,
    SamVisionConfig,
)

from fastattn import FastattnWarning
from fastattn.common.notice import _given

_TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
BY_NAME = {
    "falcon": FalconConfig(**_TEXT),
    "falcon with ALiBi": FalconConfig(**_TEXT, alibi=True),
    "gpt_neo": GPTNeoConfig(
        vocab_size=99,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "sam": SamVisionConfig(**_VISION, output_channels=8, global_attn_indexes=[1], window_size=2, mlp_dim=48),
    "data2vec-vision": Data2VecVisionConfig(**_VISION),
}


def forward(config: Any, attention: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", BY_NAME)
def test_classes_chosen_by_name_fall_back_to_eager(name: str) -> None:
    config = BY_NAME[name]
    inputs: dict[str, torch.Tensor] = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if hasattr(config, "vocab_size") and "vision" not in type(config).__name__.lower():
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, :3] = 0
        inputs = {"input_ids": torch.randint(3, 99, (2, 9)), "attention_mask": mask}
    _given.clear()
    with pytest.warns(FastattnWarning, match="attention classes of their own"):
        found = forward(config, "fastattn", inputs)
    expected = forward(config, "eager", inputs)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def test_a_part_of_a_model_falls_back_to_eager() -> None:
    config = BarkCoarseConfig(
        input_vocab_size=99, output_vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, block_size=64
    )
    from transformers.models.bark.modeling_bark import BarkCoarseModel

    ids, outputs = torch.randint(3, 99, (2, 9)), []
    for attention in ("eager", "fastattn"):
        torch.manual_seed(0)
        model = BarkCoarseModel._from_config(copy.deepcopy(config), attn_implementation=attention).eval()
        with torch.no_grad():
            outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_warning_for_layers_that_add_the_mask_themselves() -> None:
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    inputs = {"input_ids": torch.randint(3, 99, (2, 9)), "attention_mask": mask}
    _given.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = forward(config, "fastattn", inputs)
    assert sum("computes attention itself" in str(w.message) for w in caught) == 1
    expected = forward(config, "eager", inputs)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_warning_for_layers_without_masks() -> None:
    config = DebertaConfig(**_TEXT, intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"])
    _given.clear()
    with pytest.warns(FastattnWarning, match="DisentangledSelfAttention of DebertaModel computes attention itself"):
        AutoModel.from_config(config, attn_implementation="fastattn")


def test_no_warning_for_models_that_call_fastattn() -> None:
    _given.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastattnWarning)
        AutoModel.from_config(LlamaConfig(**_TEXT, intermediate_size=48), attn_implementation="fastattn")
        AutoModel.from_config(FalconConfig(**_TEXT), attn_implementation="eager")


def test_warning_when_the_attention_is_switched() -> None:
    config = Gemma3nAudioConfig(
        hidden_size=32, conf_num_hidden_layers=1, conf_num_attention_heads=4, sscp_conv_channel_size=(8, 4)
    )
    model = AutoModel.from_config(config, attn_implementation="eager")
    _given.clear()
    with pytest.warns(FastattnWarning, match="Gemma3nAudioAttention of Gemma3nAudioEncoder"):
        model.set_attn_implementation("fastattn")
