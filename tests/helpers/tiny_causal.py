"""Tiny language models with large random weights, and what transformers says to a prompt: the truth of the engine."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")
from fastattn.lm import Loaded
from fastattn.lm.generation.engine import Engine

VOCABULARY = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


def made(config: Any, attn: str = "fastattn") -> Any:
    """A model of the config, always with the same weights, so large that who attends to whom shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def loaded(model: Any, tokenizer: Any = None, name: str = "tiny") -> Loaded:
    return Loaded(model, tokenizer, model.config.get_text_config(), name)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (tokens,), generator=generator).tolist()


def said(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The engine's tokens."""
    found: list[list[int]] = [[] for _ in prompts]
    for event in engine.generate(prompts, count):
        found[event.request].append(event.token)
    return found


@torch.no_grad()
def whole(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens, each by a forward pass over the whole text, without a cache."""
    text = list(ids)
    for _ in range(count):
        text.append(int(model(input_ids=torch.tensor([text]), **options).logits[0, -1].argmax()))
    return text[len(ids) :]


@torch.no_grad()
def generated(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """transformers' own greedy generate."""
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, **options)
    return out[0, len(ids) :].tolist()
