"""What a transformers model of Llama's kind is made of, and which models are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._compat.transformers import ranks_of
from .layers import Product, Rotary

#: Model types whose layers compute what `FusedRunner` computes; each is compared with transformers in the tests.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
#: Kinds of rotary positions whose angles depend on the position alone, not on how long the sequence is by now.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    qkv: Product
    rotary: Rotary
    scale: float
    window: int | None  #: keys that a query sees, itself included
    out: Product
    gate_up: Product
    down: Product


def check(model: Any) -> None:
    """Raises ValueError, with the reason, for a model that `FusedRunner` cannot run."""
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"model: expected a causal language model of one of {', '.join(FAMILIES)}, got {kind}")
    if type(model).__name__ != FAMILIES[kind]:
        raise ValueError(f"model: expected {FAMILIES[kind]}, got {type(model).__name__}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"model: expected the activation silu, got {config.hidden_act}")
    if getattr(config, "mlp_bias", False):
        raise ValueError("model: a bias in its gated products (mlp_bias) is not supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ValueError(f"model: expected rotary positions of one of {', '.join(ROPE_TYPES)}, got {rope}")
    # Where transformers spread the weights over ranks, its hooks around each layer join what they compute.
    if ranks_of(model) > 1 or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError("model: expected whole weights on this rank, got parts of them (tensor parallel)")
    first = model.model.layers[0]
    linears = [first.self_attn.q_proj, first.self_attn.o_proj, first.mlp.gate_proj, first.mlp.down_proj, model.lm_head]
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise ValueError(f"model: expected plain nn.Linear layers, got {type(linear).__name__}")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"model: expected parameters of one floating dtype, got {', '.join(map(str, dtypes))}")
    if len({parameter.device for parameter in model.parameters()}) != 1:
        raise ValueError("model: expected all parameters on one device")
    dim = first.self_attn.head_dim
    cos, _ = _angles(model, 1)
    if cos.shape[1] != dim:
        raise ValueError(f"model: expected rotary positions over the whole head dim {dim}, got {cos.shape[1]}")


def read(model: Any, capacity: int) -> tuple[list[Layer], Product]:
    """The layers of a checked model, with angles for `capacity` positions, and the product that makes the logits.

    Products of one input are merged: q, k, v of a layer into one weight, gate and up into another. The model's own
    parameters become views of them, so that it goes on working and takes no more memory.
    """
    config = model.config
    cos, sin = _angles(model, capacity)
    layers = []
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        rotary = Rotary(
            q_heads, kv_heads, cos, sin,
            None if q_norm is None else q_norm.weight.detach(),
            None if k_norm is None else k_norm.weight.detach(),
            0.0 if q_norm is None else q_norm.variance_epsilon,
        )  # fmt: skip
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        qkv, bias = _merged([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up, _ = _merged([mlp.gate_proj, mlp.up_proj])
        layers.append(
            Layer(
                qkv=Product(qkv, bias, gain=before.weight.detach(), eps=before.variance_epsilon),
                rotary=rotary,
                scale=attention.scaling,
                window=_window(config, index),
                out=Product(attention.o_proj.weight, attention.o_proj.bias, add=True),
                gate_up=Product(gate_up, gain=after.weight.detach(), eps=after.variance_epsilon, gated=True),
                down=Product(mlp.down_proj.weight, add=True),
            )
        )
    last = model.model.norm
    return layers, Product(model.lm_head.weight, gain=last.weight.detach(), eps=last.variance_epsilon)


@torch.no_grad()
def _merged(linears: list[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight for several products of the same input, and one bias; the linears keep views of them."""
    merged: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            merged.append(None)
            continue
        whole = _joined([part.data for part in parts])
        for part, view in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
            part.data = view
        merged.append(whole)
    weight, bias = merged
    assert weight is not None
    return weight, bias


def _joined(parts: list[Tensor]) -> Tensor:
    """The tensors end to end: in place where an earlier merge left them so."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _angles(model: Any, capacity: int) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, `[capacity, R]`, in the model's dtype: as its layers get them."""
    weight = model.lm_head.weight
    positions = torch.arange(capacity, device=weight.device)[None]
    cos, sin = model.model.rotary_emb(weight, positions)
    return cos[0].contiguous(), sin[0].contiguous()


def _window(config: Any, index: int) -> int | None:
    """See `Layer.window`."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return None if types and types[index] != "sliding_attention" else window
