"""Fused layers take a model only where all of it is what it seems; anything else runs as it is."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import SIZES, loaded, made, prompt, tokens_of, whole
from torch import nn
from torch.nn.utils import parametrize

from fastattn.lm import make_engine
from fastattn.lm.runners.fused import FusedRunner

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")


class Lora(nn.Module):
    """As peft's layer: wraps a Linear and shows its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.3)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a.t() @ self.b.t()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _wrap(where: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parent, _, name = where.rpartition(".")
        setattr(model.get_submodule(parent), name, Lora(model.get_submodule(where)))

    return change


def _double(module: Any) -> Any:
    return types.MethodType(lambda self, *x, **rest: type(self).forward(self, *x, **rest) * 2, module)


def _subclass(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = Doubled


def _bias(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.bias = nn.Parameter(torch.ones(16))


def _head_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.arange(SIZES["vocab_size"]) / 30)


def _max_norm(model: Any) -> None:
    model.model.embed_tokens.max_norm = 0.1


def _activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _replace(where: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(where)
        module.forward = _double(module)

    return change


#: Each changes the logits of the model; most leave the first layer unchanged.
CHANGES: dict[str, Callable[[Any], None]] = {
    **{f"adapter on {name}": _wrap(f"model.layers.1.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")},
    "adapter on o_proj": _wrap("model.layers.1.self_attn.o_proj"),
    **{f"adapter on {name}": _wrap(f"model.layers.1.mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
    "adapter on v_proj of the first layer": _wrap("model.layers.0.self_attn.v_proj"),
    "adapter on the head": _wrap("lm_head"),
    "hook on a norm": lambda m: m.model.layers[1].input_layernorm.register_forward_hook(lambda *x: 2 * x[2]),
    "hook on the last norm": lambda m: m.model.norm.register_forward_hook(lambda *x: x[2].roll(1, -1)),
    "hook before an mlp": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "hook on the embedding": lambda m: m.model.embed_tokens.register_forward_hook(lambda *x: x[2].roll(1, -1)),
    "hook on rotary positions": lambda m: m.model.rotary_emb.register_forward_hook(lambda *x: (x[2][1], x[2][0])),
    "replaced forward of a projection": _replace("model.layers.1.self_attn.v_proj"),
    "replaced forward of the head": lambda m: setattr(
        m.lm_head, "forward", lambda x: nn.functional.linear(x, m.lm_head.weight).roll(1, -1)
    ),
    "parametrized": lambda m: parametrize.register_parametrization(m.model.layers[1].mlp.up_proj, "weight", Twice()),
    "subclass": _subclass,
    "bias of k alone": _bias,
    "bias of the head": _head_bias,
    "embedding with max_norm": _max_norm,
    "another activation": _activation,
    "another scale": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.9),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_anywhere_counts(name: str) -> None:
    plain, changed, truth = (made(hf.LlamaConfig(**SIZES), attn) for attn in ("eager", "fastattn", "eager"))
    for model in (changed, truth):
        CHANGES[name](model)
    ids = prompt(12)
    expected = whole(truth, ids, 10)
    assert expected != whole(plain, ids, 10)
    if name != "another scale":  # a scale is read from the layer that has it
        with pytest.raises(ValueError, match=r"^model: "):
            FusedRunner(changed, rows=1, capacity=64)
    assert tokens_of(make_engine(loaded(changed), 1, 64), [ids], 10) == [expected]


def test_what_says_nothing_but_could_is_refused() -> None:
    extra, trained, shared = (made(hf.LlamaConfig(**SIZES)) for _ in range(3))
    extra.model.layers[1].mlp.register_buffer("scale", torch.ones(1))
    trained.train()
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    for model, why in ((extra, "scale"), (trained, "eval mode"), (shared, "modules of its own")):
        with pytest.raises(ValueError, match=why):
            FusedRunner(model, rows=1, capacity=64)


def test_a_class_that_was_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model = made(hf.LlamaConfig(**SIZES))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(ValueError, match="expected the forward of transformers"):
        FusedRunner(model, rows=1, capacity=64)


@pytest.mark.parametrize("name", ["adapter on v_proj", "hook on a norm", "replaced forward of a projection"])
def test_a_change_after_the_runner_was_made_is_noticed(name: str) -> None:
    model = made(hf.LlamaConfig(**SIZES))
    engine = make_engine(loaded(model), 1, 64)
    ids = prompt(12)
    tokens_of(engine, [ids], 3)
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match="the model was changed while a runner of its weights lives"):
        tokens_of(engine, [ids], 3)
    assert tokens_of(make_engine(loaded(model), 1, 64), [ids], 6) == [whole(model, ids, 6)]


def test_a_model_that_was_moved_or_cast_is_noticed() -> None:
    model = made(hf.LlamaConfig(**SIZES))
    runner = FusedRunner(model, rows=1, capacity=64)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="changed"):
        runner.prefill(0, torch.tensor([1, 2]))


def test_weights_loaded_in_place_are_seen() -> None:
    model = made(hf.LlamaConfig(**SIZES))
    engine = make_engine(loaded(model), 1, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    ids = prompt(12)
    assert tokens_of(engine, [ids], 6) == [whole(model, ids, 6)]
