"""What is asked before a model is spread over ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from fastattn.lm.loading.tensor_parallel import spread_options

pytestmark = pytest.mark.skipif(
    not hasattr(transformers.PreTrainedConfig, "per_layer_config"), reason="here all layers of a model are alike"
)


def config(global_kv_heads: int) -> Any:
    """Four heads, two K/V heads in its first layer, `global_kv_heads` in its second one."""
    return transformers.Gemma4TextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        attention_k_eq_v=True,
        num_global_key_value_heads=global_kv_heads,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
    )


def options(global_kv_heads: int, ranks: int) -> dict[str, Any]:
    return spread_options(config(global_kv_heads), SimpleNamespace(size=ranks))  # type: ignore[arg-type]


def test_ranks_divide_the_heads_of_every_layer() -> None:
    assert options(2, ranks=2)["distributed_config"].tp_size == 2
    assert options(1, ranks=1) == {}
    with pytest.raises(ValueError, match="divides the model's 4 heads and 1 K/V heads, got 2"):
        options(1, ranks=2)
    with pytest.raises(ValueError, match="divides the model's 4 heads and 2 K/V heads, got 4"):
        options(2, ranks=4)
