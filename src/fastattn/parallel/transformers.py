"""Models of transformers over the ranks of a `ContextParallel`.

Importing this module registers the attention implementation "fastattn_cp", which `over_ranks` and `decoding` switch a
model to within their blocks. Its attention function has to know the sequence that a layer's tokens are a shard of
(`_State`). transformers passes it the module and nothing of the caller's; a context variable would not reach autograd's
threads, which recompute checkpointed layers. So the state is an attribute of the model's modules within the block
(`_set_state`, `_state_of`, `_drop_state`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from .._compat.attention_classes import computes_own_attention
from .._compat.transformers import attention_name, can_switch_attention, set_attention_name
from ..integrations.transformers.attention import REFUSED
from ..integrations.transformers.lazy_mask import Band, Compact, LazyMask
from ..integrations.transformers.patterns import recognise
from ..masks import Intervals
from .attention import ShardedAttention
from .sequence import Lengths

NAME = "fastattn_cp"  #: never a name with "sdpa" or "flash" in it: transformers treats both specially
#: Kinds of layers that mix tokens in attention alone.
LAYERS = frozenset({"full_attention", "sliding_attention"})
_STATE = "_fastattn_over_ranks"


class ShardedCache(DynamicCache):
    """A DynamicCache of which each rank keeps its share: of the prompt the shard that it computed, of the tokens that
    follow one in `ranks`, in turn. All layers keep all tokens; windows are cut out when they are attended to.

    The host knows every length, so that the memory is transformers' own. cp: the ranks. length: tokens of the prompt on
    all ranks together.
    """

    def __init__(self, cp: ShardedAttention, length: int) -> None:
        super().__init__()
        self.cp, self.length = cp, length
        self.positions = cp.layout(length).positions(cp.rank).tolist()  #: of this rank's tokens, ascending
        self.seen: dict[int, int] = {}  #: tokens of all ranks that each layer has seen

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        before = self.seen.get(layer_idx)
        if before is None:  # the prompt
            if key_states.shape[2] != len(self.positions):
                raise ValueError(
                    f"ShardedCache: expected the {len(self.positions)} of {self.length} tokens that rank "
                    f"{self.cp.rank} holds, got {key_states.shape[2]}"
                )
            self.seen[layer_idx] = self.length
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[2] != 1:
            raise ValueError(f"ShardedCache: expected one token after the prompt, got {key_states.shape[2]}")
        self.seen[layer_idx] = before + 1
        if before % self.cp.size == self.cp.rank:
            if not self.positions or self.positions[-1] < before:
                self.positions.append(before)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of all ranks: the position of the next token."""
        return self.seen.get(layer_idx, 0)

    def out_of_window(self, window: int) -> int:
        """The number of this rank's tokens that are before the window of the newest token."""
        newest = max(self.seen.values(), default=0) - 1
        return bisect_right(self.positions, newest - window)


@dataclass
class _State:
    """The sequence that a model's tokens are a shard of."""

    cp: ShardedAttention
    length: int
    cu_seqlens: tuple[int, ...] | None = None
    cache: ShardedCache | None = None  #: in decode
    before: dict[int, tuple[Any, Any]] = field(default_factory=dict)  #: by id: configs and their implementations
    closed: bool = False


def _state_of(module: torch.nn.Module) -> _State | None:
    found: _State | None = getattr(module, _STATE, None)
    return found


def _set_state(modules: list[torch.nn.Module], state: _State) -> None:
    for module in modules:
        setattr(module, _STATE, state)


def _drop_state(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        delattr(module, _STATE)


@contextmanager
def over_ranks(
    cp: ShardedAttention, model: torch.nn.Module, length: int, cu_seqlens: Lengths | None = None
) -> Iterator[None]:
    """Within the block, `model(input_ids=cp.shard(ids, 1), position_ids=cp.positions(length))` attends over all ranks.

    With activation checkpointing the backward belongs into the block as well: it computes attention again.

    Args:
        model: a model of transformers whose attention goes through its `AttentionInterface`.
        length: tokens of all ranks together.
        cu_seqlens: packed sequences of one batch entry, as in `ContextParallel.attention`. (Padding is not supported:
            pack instead.)

    Raises:
        ValueError: the model mixes tokens otherwise than in attention, as far as its config describes its layers.
    """
    cuts = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    with _switched(model, _State(cp, length, None if cuts is None else tuple(int(x) for x in cuts))):
        yield


@contextmanager
def decoding(cp: ShardedAttention, model: torch.nn.Module, cache: ShardedCache) -> Iterator[None]:
    """Within the block, `model(input_ids=token, cache=cache)` attends to the cache's shards on all ranks.

    token: `[B, 1]`, the same on every rank, and so are the logits. Each call is collective.
    """
    with _switched(model, _State(cp, cache.length, cache=cache)):
        yield


def _check(model: torch.nn.Module, configs: list[Any]) -> None:
    """Raises ValueError for models that mix tokens elsewhere than in an attention function."""
    kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}
    if kinds - LAYERS:
        raise ValueError(
            f"model: {type(model).__name__} has layers of the kinds {', '.join(sorted(kinds - LAYERS))}, which would "
            f"see each rank's tokens alone: expected {' and '.join(sorted(LAYERS))} only"
        )
    if not can_switch_attention(model) or any(computes_own_attention(model, config) for config in configs):
        raise ValueError(f"model: {type(model).__name__} computes attention by itself: it cannot be spread over ranks")


@contextmanager
def _switched(model: torch.nn.Module, state: _State) -> Iterator[None]:
    modules = list(model.modules())
    last = _state_of(model)
    if last is not None and not last.closed:
        raise RuntimeError("this model attends over ranks already: cp.model and cp.decoding do not nest")
    found: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    configs = {id(config): config for config in found}  # parents first
    _check(model, list(configs.values()))
    known = last.before if last is not None else {}
    state.before = known or {key: (config, attention_name(config)) for key, config in configs.items()}
    for config in configs.values():
        set_attention_name(config, NAME)
    _set_state(modules, state)
    try:
        yield
    finally:
        computes_again = torch.is_grad_enabled() and any(
            module.training and getattr(module, "gradient_checkpointing", False) for module in modules
        )
        if computes_again:
            # A backward after the block would silently attend to this rank's tokens alone: it has to raise.
            state.closed = True
        else:
            for config, name in state.before.values():
                set_attention_name(config, name)
            _drop_state(modules)


def attention_over_ranks(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers' `AttentionInterface`: see `fastattn.hf.attention_forward`. Collective.

    Raises:
        RuntimeError: outside of the blocks of `over_ranks` and `decoding`.
        ValueError: dropout, or an argument that changes what is computed and that is not supported.
    """
    state = _state_of(module)
    if state is None or state.closed:
        raise RuntimeError(
            f'attn_implementation="{NAME}" works within `with cp.model(model, length):` alone. With activation '
            "checkpointing the backward belongs into the block too; to use the model without ranks again, call "
            'model.set_attn_implementation("fastattn")'
        )
    for name in (*REFUSED, "position_bias", "indices"):
        if kwargs.get(name) is not None:
            raise ValueError(f"context parallel attention cannot do `{name}` of {type(module).__name__}")
    if attention_mask is not None and not isinstance(attention_mask, RankMask):
        raise ValueError(f"context parallel attention takes no mask; {type(module).__name__} brings its own")
    if dropout:
        raise ValueError("context parallel attention has no dropout: set attention_dropout=0 in the model's config")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if attention_mask is not None:
        band = attention_mask.band
        assert band is not None
        causal, sliding_window = band.right == 0, band.left + 1 if band.left >= 0 else None
    options: dict[str, Any] = {"scale": scaling, "sinks": s_aux, "softcap": softcap or None}
    if state.cache is not None:
        if sliding_window:
            first = state.cache.out_of_window(sliding_window)
            key, value = key[:, :, first:], value[:, :, first:]
        out = state.cp.decode(query, key, value, **options)
    else:
        window = (sliding_window - 1, -1) if sliding_window and causal else None
        mask = "causal" if causal else None
        options |= {"length": state.length, "cu_seqlens": state.cu_seqlens, "window": window, "mask": mask}
        out = state.cp.attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


class RankMask(LazyMask):
    """A `LazyMask` over the tokens of all ranks: a Band alone, as no rank has the keys for a dense mask."""

    def dense(self) -> Tensor:
        raise ValueError(
            "model: it computes with its attention mask, or attends by itself: it cannot be spread over ranks"
        )


def rank_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Any = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> RankMask:
    """The mask function: causality and windows as the model requests them. Packing is described by cu_seqlens.

    Raises:
        ValueError: padding, or a mask that is neither causal nor bidirectional, with or without a window.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("context parallel attention has no padding: pack the sequences and pass cu_seqlens")
    pattern = None if mask_function is None else recognise(mask_function)
    # transformers derives segments from a shard's positions; those of the whole sequence are in cu_seqlens.
    # The ranks' attention has causal windows alone.
    two_sided = pattern is not None and pattern.right != 0 and (pattern.left >= 0 or pattern.right > 0)
    if pattern is None or pattern.chunk or two_sided:
        raise ValueError(
            "context parallel attention knows full masks, and causal ones with or without a window: not this one"
        )
    nothing = torch.empty(0, dtype=torch.int32, device=device)  # of the device, and else unused
    band = Band(kv_length, pattern.left, pattern.right)
    return RankMask(Compact(Intervals(nothing, nothing), band), (batch_size, 1, q_length, kv_length), dtype)


AttentionInterface.register(NAME, attention_over_ranks)
AttentionMaskInterface.register(NAME, rank_mask)
