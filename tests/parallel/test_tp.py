"""Tensor parallel in transformers: two processes with `tp_plan="auto"` on fastattn give one process's logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import relative_error
from ranks import Ranks
from torch import Tensor

IDS = torch.arange(1, 20)[None]


def save(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import fastattn.hf  # noqa: F401  (registers "fastattn")

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastattn", dtype=torch.float32, **options)


def logits_of(folder: str) -> tuple[Tensor, list[int], int]:
    """Logits of a forward and of a step with its cache, the shape of q_proj's weight here, calls served."""
    import fastattn
    from fastattn._compat.transformers import cache_argument, with_cache

    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}  # as torchrun does
    model = load(folder, tp_plan="auto").eval()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :-1], use_cache=True)
        then = model(input_ids=IDS[:, -1:], **with_cache(model, first[cache_argument(model)]))
    weight: Any = model.model.layers[0].self_attn.q_proj.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return torch.cat([first.logits, then.logits], 1), list(local.shape), sum(fastattn.stats()["calls"].values())


def test_tensor_parallel_gives_the_logits_of_one_process(tmp_path: Path, two: Ranks) -> None:
    save(tmp_path)
    with torch.no_grad():
        want = load(str(tmp_path)).eval()(input_ids=IDS).logits
    for logits, shape, calls in two.run(logits_of, str(tmp_path)):
        assert shape == [16, 32]  # half of the heads
        assert calls >= 4  # two layers, prompt and step
        assert relative_error(logits, want) < 1e-5
