"""torch's function with fastattn below it: `scaled_dot_product_attention`, `explain`.

A call is handed to torch's own function, with the arguments as they came, where its kernels would serve it anyway,
where fastattn takes no such call, and where someone wants to see torch's function or chose among its kernels
(`decide.py`). Every other call is translated (`translate.py`) and takes the op's way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ... import api
from ..._compat import sdpa as torchs
from ...dispatch import fast_path, handed_over, routes
from ...dispatch.native import calls
from . import known
from .decide import (
    CLASS,
    DEVICE,
    DROPOUT,
    MODE,
    TRACED,
    VMAP,
    Decision,
    at_once,
    decision,
    translated,
    why_torch_when_traced,
)
from .translate import Translated, folded


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, on fastattn's backends where they are faster.

    Args:
        query: `[..., Hq, Sq, D]`, any number of leading dims, which broadcast.
        key: `[..., H, Skv, D]`.
        value: `[..., H, Skv, Dv]`.
        attn_mask: bool (True = attend), or additive in query's dtype or float32; broadcastable to `[..., Hq, Sq, Skv]`.
        dropout_p: other than 0: torch's own kernels compute the call.
        is_causal: query i sees the keys up to i (aligned to the **upper left**, as torch has it).
        scale: default `1 / sqrt(D)`.
        enable_gqa: Hq may be a multiple of H.

    Returns:
        `[..., Hq, Sq, Dv]` in query's dtype; contiguous where the inputs have not four dims, else token-major or
        contiguous. A row that may see nothing gives 0.

    Raises:
        What torch raises: a call that is not as described is handed to torch's own function.
    """
    why = at_once(query)
    if not why:
        arguments = query, key, value, "causal" if is_causal is True else attn_mask, None, None, None, None, None, False
        usual = known.is_usual(attn_mask, dropout_p, is_causal, enable_gqa)
        place = known.place(enable_gqa) if usual and calls.module is not None else None
        if place is not None and (out := calls.module.attention(arguments, scale, *place)) is not None:
            return out  # type: ignore[no-any-return]
        kind = known.kind_of(arguments, scale, enable_gqa) if usual else None
        before = None if kind is None else known.find(kind, query)
        if before.__class__ is str:
            why = before  # type: ignore[assignment]
        else:
            served = None if before is None else fast_path.attention(None, arguments, scale, before, place)  # type: ignore[arg-type]
            if served is not None:
                return served[0]
            why, out = _decided(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, kind)
            if out is not None:
                return out
        if why is VMAP:
            return _Mapped.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)  # type: ignore[no-any-return]
    if why == TRACED:
        why = why_torch_when_traced(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if not why:
            return _translated(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    else:
        handed_over.count(why)
    if attn_mask is not None and torchs.is_bias_class(attn_mask):
        # Its class knows torch's function by the name in torch.nn.functional, where ours may be.
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        function = functional.scaled_dot_product_attention
        return type(attn_mask).__torch_function__(function, (type(attn_mask),), (query, key, value, attn_mask), options)
    return torchs.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _decided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    kind: Any,
) -> tuple[str, Tensor | None]:
    """Why torch serves a call, or else its output. kind: what `known.kind_of` said of it."""
    generation = routes.generation()
    found = decision(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)
    out = None
    if not found.why_torch:
        if found.as_it_is:
            scale = scale if scale is None or type(scale) is float else float(scale)
            out = api.scaled_dot_product_attention(q, k, v, mask="causal" if is_causal else mask, scale=scale)
        else:
            out = _translated(q, k, v, mask, is_causal, scale, enable_gqa)
    if kind is not None:
        known.remember(kind, found, q, mask, generation)
    return found.why_torch, out  # type: ignore[return-value]


def _translated(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: Any, enable_gqa: bool
) -> Tensor:
    """The output of a call that fastattn serves."""
    found = translated(q, k, v, mask, is_causal, enable_gqa)
    assert isinstance(found, Translated)
    a, shape = found
    scale = None if scale is None else float(scale)
    out = api.scaled_dot_product_attention(a.q, a.k, a.v, mask=a.mask, window=a.window, scale=scale)
    assert isinstance(out, Tensor)
    return out if shape is None else out.contiguous().reshape(shape)


class _Mapped(torch.autograd.Function):
    """A call within `torch.func.vmap`: the mapped dim becomes one more leading dim of a call outside of it."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, mask: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Any:
        return torchs.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Any, k: Any, v: Any, mask: Any, *options: Any) -> Any:
        rank = max(x.dim() - (dim is not None) for x, dim in zip((q, k, v), in_dims))
        q, k, v, mask = (_leading(x, dim, rank) for x, dim in zip((q, k, v, mask), in_dims))
        q = q.expand(info.batch_size, *q.shape[1:])  # also where the mask alone is mapped
        is_causal, scale, enable_gqa = options
        shape = None
        fits = mask is None or mask.dim() <= rank + 1
        if fits and (rank > 3 or enable_gqa):  # torch's fused kernels take four dims alone
            found = folded(q, k, v, mask, enable_gqa)
            if not isinstance(found, str):  # torch says then what is wrong
                q, k, v, mask, shape = found
        out = scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return (out if shape is None else out.reshape(shape)), 0


def _leading(x: Tensor | None, dim: int | None, rank: int) -> Any:
    """x with the mapped dim, or one of 1, before `rank` others."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x[(slice(None), *(None,) * (rank + 1 - x.dim()))]


@dataclass(frozen=True)
class Served:
    """Who serves a call of torch's function. Printing it gives a few lines."""

    chosen: str  #: a backend of fastattn, or "torch" for torch's own function with the arguments as they came
    reason: str  #: why torch's own function; "" for a backend
    explanation: api.Explanation | None  #: what fastattn's backends say, where the op has words for the call

    def __str__(self) -> str:
        head = f"torch's own function: {self.reason}" if self.reason else f"fastattn's backend {self.chosen}"
        return head if self.explanation is None else f"{head}\n{self.explanation}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Served:
    """Who would serve `scaled_dot_product_attention` with these arguments here and now, and why. Computes nothing.

    Takes the function's arguments, and raises nothing: a call that torch refuses is one that torch is asked for. Not
    for use under torch.compile.
    """
    found = Decision(at_once(query))
    if found.why_torch not in (CLASS, DEVICE, MODE):
        found = decision(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    explanation = None
    if not found.why_torch or found.why_torch == DROPOUT or found.why_torch.startswith("torch's kernels"):
        words = translated(query, key, value, attn_mask, is_causal, enable_gqa)
        if isinstance(words, Translated):
            a = words.arguments
            try:
                explanation = api.explain(a.q, a.k, a.v, mask=a.mask, window=a.window, scale=scale)
            except (ValueError, TypeError):
                explanation = None
    serves = not found.why_torch and explanation is not None and explanation.chosen
    return Served(str(serves) if serves else "torch", found.why_torch, explanation)
