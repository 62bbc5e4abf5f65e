"""Attention modules whose rotary embedding liger-kernel can compute.

transformers' attention modules call the global function `apply_rotary_pos_emb` of their module. A module is given a
copy of its own forward that finds liger-kernel's function there; the global itself belongs to every model of the
family.

Two things are tried before that: that the global function computes one of the two known embeddings, and that the copy
computes what the forward computes, its gradients included. In the second trial the other function rotates in place, as
liger-kernel's does, so that a forward that uses the unrotated queries or keys for anything else shows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..._compat.functions import NotCopied, innermost, with_globals
from ..._compat.transformers import attention_name, set_attention_name
from ...common.notice import warn_once
from ..module_hooks import without_hooks
from .trial import close, equal, fits_kernels, is_differentiable, random

ROPE = "apply_rotary_pos_emb"  #: its name in every modeling module of transformers
_NAME = "fastattn-trial"
_BATCH, _TOKENS = 2, 3

Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


def _rotate_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first entries of each head, as many as cos has, half by half. cos and sin contain each angle twice."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    other = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    found = (turned * cos.unsqueeze(1)) + (other * sin.unsqueeze(1))
    return torch.cat([found, rest], -1) if rest.shape[-1] else found


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for whole heads, where cos and sin contain each angle once."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def recognise(module: Any) -> bool | None:
    """Whether cos and sin of an attention module contain each angle once; None if liger-kernel cannot replace its
    rotary embedding."""
    kind: Any = type(module)
    dim = getattr(module, "head_dim", None)
    children = {name for name, _ in module.named_children()}
    if not kind.__module__.startswith("transformers.") or not isinstance(dim, int) or "o_proj" not in children:
        return None
    if not children & {"q_proj", "qkv_proj"}:
        return None
    function = innermost(kind.forward).__globals__.get(ROPE)
    if not callable(function):
        return None
    for once, rotate in ((False, _rotate_full), (True, _rotate_halves)):
        if _computes(function, rotate, once):
            try:
                return once if _uses_nothing_else(without_hooks(module), rotate, dim // 2 if once else dim) else None
            except NotCopied as error:
                warn_once(f"its rotary embedding is not fused, which is slower: {error}", f"rope of {kind.__name__}")
            except Exception:  # a forward that takes other inputs
                pass
            return None
    return None


def _computes(function: Any, rotate: Rotation, once: bool) -> bool:
    """Whether a rotary function computes a rotation, bit for bit: of whole heads, and of a part of each if it takes
    that."""
    found = []
    for size in (8,) if once else (16, 8):
        same = True
        for dtype, angle_dtype in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
            like, angles = torch.empty(0, dtype=dtype), torch.empty(0, dtype=angle_dtype)
            q, k = random((_BATCH, 4, _TOKENS, 16), like), random((_BATCH, 2, _TOKENS, 16), like, seed=1)
            cos, sin = (random((_BATCH, _TOKENS, size), angles, seed=seed) for seed in (2, 3))
            try:
                pair = function(q.clone(), k.clone(), cos, sin)
            except Exception:  # it does not take such angles
                same = size == 8 and not once
                break
            same = same and len(pair) == 2 and all(equal(x, rotate(y, cos, sin)) for x, y in zip(pair, (q, k)))
        found.append(same)
    return all(found)


class _InPlace(torch.autograd.Function):
    """A rotation that overwrites its inputs, as liger-kernel's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotation) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        x.data.copy_(rotate(x, cos, sin))  # unseen by autograd, as a kernel's writes are
        return x.transpose(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        with torch.enable_grad():
            x = torch.zeros_like(gradients[0]).requires_grad_()
            (found,) = torch.autograd.grad(ctx.rotate(x, cos, sin), x, gradients[0])
        return found, None, None, None


def _uses_nothing_else(module: Any, rotate: Rotation, size: int) -> bool:
    """Whether a forward with an in-place rotation computes the same, gradients included, and calls it once."""
    calls: list[int] = []

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return _InPlace.apply(q, cos, sin, rotate), _InPlace.apply(k, cos, sin, rotate)  # type: ignore[no-untyped-call]

    forward = type(module).forward
    copy = with_globals(forward, {ROPE: in_place})
    (out, *gradient), (expected, *expected_gradient) = _results(module, forward, size), _results(module, copy, size)
    return len(calls) == 1 and equal(out, expected) and all(map(close, gradient, expected_gradient))


def _results(module: Any, forward: Any, size: int) -> list[Tensor]:
    """The output of an attention module's forward on random hidden states, and their gradient, with a simple
    attention."""
    like = next(module.parameters())
    config = module.config
    hidden = random((_BATCH, _TOKENS, config.hidden_size), like)
    cos, sin = (random((_BATCH, _TOKENS, size), like, seed=seed) for seed in (2, 3))
    before = attention_name(config)
    _register()
    set_attention_name(config, _NAME)
    differentiable = is_differentiable(module)
    try:
        with torch.inference_mode(not differentiable), torch.set_grad_enabled(differentiable):
            hidden = hidden.clone().requires_grad_(differentiable)
            out = forward(module, hidden_states=hidden, position_embeddings=(cos, sin), attention_mask=None)[0]
            return [out.detach(), *(torch.autograd.grad(out.sum(), hidden) if differentiable else ())]
    finally:
        set_attention_name(config, before)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Each token's product of query and key, times its value: depends on all three, and on nothing else."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((q * k).sum(-1, keepdim=True) * v).transpose(1, 2), None


def fused_attention(function: Any, kind: type, once: bool) -> FunctionType:
    """An attention module's forward with liger-kernel's rotary function."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return with_globals(forward, {ROPE: fused_rope(function, innermost(forward).__globals__[ROPE], once)})


def fused_rope(function: Any, original: Callable[..., Any], once: bool) -> Callable[..., Any]:
    """A rotary function that calls liger-kernel's. once: cos and sin contain each angle once, not twice."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim != 1 or not fits_kernels(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim)
        if q.shape[2] == 1:
            # liger-kernel takes the stride from token to token for that from row to row as well. A dim of one token
            # may have any stride: here the one that is right for both.
            q, k = (x.flatten(1).unflatten(1, (1, *x.shape[1::2])).transpose(1, 2) for x in (q, k))
        if once:
            return function.apply(q, k, cos, sin, None, 1, q.shape[-1])
        return function.apply(q, k, cos, sin)

    return apply_rotary_pos_emb
