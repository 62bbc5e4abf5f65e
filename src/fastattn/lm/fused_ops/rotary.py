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
from dataclasses import dataclass
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
#: Of queries and keys, and of angles. Functions that round differently differ where the two do.
_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))

Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]  #: of a head `[B, H, S, D]`, cos and sin


@dataclass(frozen=True)
class Rope:
    """A rotary embedding that liger-kernel computes."""

    rotate: Rotation
    angles_once: bool  #: whether cos and sin contain each angle once, not twice


def _rotate_by_all_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first entries of each head, as many as cos has. cos and sin contain each angle twice."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = rotated.shape[-1] // 2
    other = torch.cat((-rotated[..., half:], rotated[..., :half]), -1)
    found = (rotated * cos.unsqueeze(1)) + (other * sin.unsqueeze(1))
    return torch.cat([found, rest], -1) if rest.shape[-1] else found


def _rotate_by_half_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates whole heads. cos and sin contain each angle once."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


ROPES = (Rope(_rotate_by_all_angles, False), Rope(_rotate_by_half_angles, True))


def recognise(module: Any) -> Rope | None:
    """The rotary embedding of an attention module; None if liger-kernel cannot compute it."""
    kind: Any = type(module)
    dim = getattr(module, "head_dim", None)
    children = {name for name, _ in module.named_children()}
    if not kind.__module__.startswith("transformers.") or not isinstance(dim, int) or "o_proj" not in children:
        return None
    if not children & {"q_proj", "qkv_proj"}:
        return None
    function = innermost(kind.forward).__globals__.get(ROPE)
    rope = next((rope for rope in ROPES if callable(function) and _computes(function, rope)), None)
    if rope is None:
        return None
    try:
        return rope if _uses_nothing_else(without_hooks(module), rope, dim // 2 if rope.angles_once else dim) else None
    except NotCopied as error:
        warn_once(f"its rotary embedding is not fused, which is slower: {error}", f"rope of {kind.__name__}")
    except Exception:  # a forward that takes other inputs
        pass
    return None


def _computes(function: Any, rope: Rope) -> bool:
    """Whether a rotary function computes an embedding, bit for bit, in each combination of dtypes.

    Also of a part of each head, if the function takes fewer angles.
    """
    whole = all(_agree(function, rope, 8 if rope.angles_once else 16, *dtypes) for dtypes in _DTYPES)
    return whole and (rope.angles_once or all(_agree(function, rope, 8, *dtypes) is not False for dtypes in _DTYPES))


def _agree(function: Any, rope: Rope, size: int, dtype: torch.dtype, angle_dtype: torch.dtype) -> bool | None:
    """Whether a rotary function of heads of 16 gives what an embedding gives; None if it refuses so many angles."""
    like, angles = torch.empty(0, dtype=dtype), torch.empty(0, dtype=angle_dtype)
    q, k = random((_BATCH, 4, _TOKENS, 16), like), random((_BATCH, 2, _TOKENS, 16), like, seed=1)
    cos, sin = (random((_BATCH, _TOKENS, size), angles, seed=seed) for seed in (2, 3))
    try:
        pair = function(q.clone(), k.clone(), cos, sin)
    except Exception:
        return None
    return len(pair) == 2 and all(equal(x, rope.rotate(y, cos, sin)) for x, y in zip(pair, (q, k)))


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


def _uses_nothing_else(module: Any, rope: Rope, size: int) -> bool:
    """Whether a forward with an in-place rotation computes the same, gradients included, and calls it once."""
    calls: list[int] = []

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return _InPlace.apply(q, cos, sin, rope.rotate), _InPlace.apply(k, cos, sin, rope.rotate)  # type: ignore[no-untyped-call]

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


def fused_attention(function: Any, kind: type, rope: Rope) -> FunctionType:
    """An attention module's forward with liger-kernel's rotary function."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return with_globals(forward, {ROPE: fused_rope(function, innermost(forward).__globals__[ROPE], rope)})


def fused_rope(function: Any, original: Callable[..., Any], rope: Rope) -> Callable[..., Any]:
    """A rotary function that calls liger-kernel's, or the original one for tensors that liger-kernel does not take."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim != 1 or not fits_kernels(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim)
        if q.shape[2] == 1:
            # liger-kernel takes the stride from token to token for that from row to row as well. A dim of one token
            # may have any stride: here the one that is right for both.
            q, k = (x.flatten(1).unflatten(1, (1, *x.shape[1::2])).transpose(1, 2) for x in (q, k))
        if rope.angles_once:
            return function.apply(q, k, cos, sin, None, 1, q.shape[-1])
        return function.apply(q, k, cos, sin)

    return apply_rotary_pos_emb
