"""Reads the layers of a transformers model of Llama's kind, and checks whether a model is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...._compat.transformers import ranks_of
from ...mask_predicates import MaskPredicate, is_causal, is_window, layer_masks
from .layers import FusedGemm, Rotary
from .structure import check_placement, check_structure

#: Model types whose layers compute what `FusedRunner` computes; each is compared with transformers in the tests.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
#: Rotary types whose angles depend on the position alone and not on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    qkv: FusedGemm
    rotary: Rotary
    scale: float
    window: int | None  #: keys that a query sees, its own included; None: all
    out: FusedGemm
    gate_up: FusedGemm
    down: FusedGemm


def check_supported(model: Any) -> None:
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
        raise ValueError("model: a bias in its MLP (mlp_bias) is not supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ValueError(f"model: expected rotary positions of one of {', '.join(ROPE_TYPES)}, got {rope}")
    # If transformers spread the weights over ranks, hooks around each layer combine their results.
    if ranks_of(model) > 1 or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError("model: expected whole weights on this rank, got parts of them (tensor parallel)")
    check_placement(model)
    check_structure(model, kind, FAMILIES[kind].removesuffix("ForCausalLM"))
    if model.model.rotary_emb.rope_type != rope:
        raise ValueError(
            f"model: expected rotary positions {rope} as its config says, got {model.model.rotary_emb.rope_type}"
        )
    if model.lm_head.bias is not None:
        raise ValueError("model: a bias of its logits (lm_head) is not supported")
    first = model.model.layers[0]
    dim = first.self_attn.head_dim
    cos, _ = _angles(model, 1)
    if cos.shape[1] != dim:
        raise ValueError(f"model: expected rotary positions over the whole head dim {dim}, got {cos.shape[1]}")
    for index, layer in enumerate(model.model.layers):
        _check_layer(config, index, layer, dim)


def _check_layer(config: Any, index: int, layer: Any, dim: int) -> None:
    """Raises ValueError for a layer whose sizes are not those of the config."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, q_heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    shapes = {
        attention.q_proj: (q_heads * dim, hidden),
        attention.k_proj: (kv_heads * dim, hidden),
        attention.v_proj: (kv_heads * dim, hidden),
        attention.o_proj: (hidden, q_heads * dim),
        mlp.gate_proj: tuple(mlp.up_proj.weight.shape),
        mlp.down_proj: (hidden, mlp.up_proj.weight.shape[0]),
    }
    where = f"model: layer {index}"
    for linear, shape in shapes.items():
        if tuple(linear.weight.shape) != shape:
            raise ValueError(f"{where}: expected a weight of {list(shape)}, got {list(linear.weight.shape)}")
    if any(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise ValueError(f"{where}: a bias in its MLP is not supported")
    if len({linear.bias is None for linear in (attention.q_proj, attention.k_proj, attention.v_proj)}) != 1:
        raise ValueError(f"{where}: expected biases of all of q, k and v, or of none")
    if attention.head_dim != dim or attention.layer_idx != index or not attention.is_causal:
        raise ValueError(f"{where}: expected causal attention of its own index over heads of {dim}")
    if getattr(attention, "num_key_value_groups", None) != q_heads // kv_heads:
        raise ValueError(f"{where}: expected {q_heads // kv_heads} heads for each of K and V")


def read_layers(model: Any, capacity: int) -> tuple[list[Layer], FusedGemm]:
    """The layers of a checked model, with angles for `capacity` positions, and the GEMM that makes the logits.

    GEMMs of the same input are merged: q, k, v of a layer into one weight, gate and up into another. The model's own
    parameters become views of the merged weights, so that the model still works and takes no additional memory.
    """
    config = model.config
    cos, sin = _angles(model, capacity)
    masks, layers = layer_masks(model), []
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
                qkv=FusedGemm(qkv, bias, gain=before.weight.detach(), eps=before.variance_epsilon),
                rotary=rotary,
                scale=attention.scaling,
                window=_window(config, index, masks.get(index)),
                out=FusedGemm(attention.o_proj.weight, attention.o_proj.bias, add=True),
                gate_up=FusedGemm(gate_up, gain=after.weight.detach(), eps=after.variance_epsilon, gated=True),
                down=FusedGemm(mlp.down_proj.weight, add=True),
            )
        )
    last = model.model.norm
    return layers, FusedGemm(model.lm_head.weight, gain=last.weight.detach(), eps=last.variance_epsilon)


@torch.no_grad()
def _merged(linears: list[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias for several linears of the same input. The parameters of the linears become views."""
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
    """The tensors concatenated: without a copy if an earlier merge placed them one after the other."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _angles(model: Any, capacity: int) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, `[capacity, R]`, in the model's dtype, as its layers get them."""
    weight = model.lm_head.weight
    positions = torch.arange(capacity, device=weight.device)[None]
    cos, sin = model.model.rotary_emb(weight, positions)
    return cos[0].contiguous(), sin[0].contiguous()


def _window(config: Any, index: int, sees: MaskPredicate | None) -> int | None:
    """See `Layer.window`. Raises ValueError for a layer whose mask is neither causal nor the config's window."""
    if sees is not None and is_causal(sees):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if sees is None or not window or not is_window(sees, window):
        raise ValueError(f"model: layer {index}: expected a causal mask, or one with the config's window {window}")
    return window
