"""The op. Read this first.

A call flows one way: here it is validated and brought into one form (`Call`); `ops.py` gives it to torch's dispatcher
where torch must see it; `dispatch.py` picks a backend by looking at a `Problem`; the backend computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._compat import torch as torch_internals
from .call import Call, Problem, work_dtype
from .dispatch import fast_path
from .dispatch import operators as ops
from .dispatch import routing as dispatch
from .masks import Intervals, Segments
from .validation import (
    LIMITS,
    check_flag,
    check_inputs,
    check_lengths,
    check_mask,
    check_scale,
    check_segments,
    check_sinks,
    check_softcap,
    check_window,
)

Mask = str | Tensor | Intervals | Segments | None


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Mask = None,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, on the fastest backend that can do it exactly. `explain` says which.

    Args:
        q: queries `[B, Hq, Sq, D]`.
        k: keys `[B, Hkv, Skv, D]`; Hq must be a multiple of Hkv (grouped-query attention, nothing is repeated).
        v: values `[B, Hkv, Skv, Dv]`. q, k, v: float16, bfloat16, float32 or float64, any strides; mixed dtypes
            promote as torch promotes; under autocast they are cast as torch's own attention casts them.
        scale: factor on the scores, default `1 / sqrt(D)`; at most 1e30 (1e290 for float64), of any sign.
        mask: None; "causal"; a bool tensor (True = attend) or an additive floating tensor, broadcastable to
            `[B, Hq, Sq, Skv]`; `Intervals`; or `Segments` (left padding, packing). "causal" is aligned to the **lower
            right**: query i sees key j when `j <= i + Skv - Sq`, what prefill in chunks and decode need. (torch's
            `is_causal` is aligned to the upper left; the two agree when Sq == Skv.)
        sinks: `[Hq]`, any floating dtype: one extra logit per head in the softmax's denominator, not scaled, without a
            value (attention sinks as in gpt-oss).
        window: `(left, right)`: the query at position p sees the keys `[p - left, p + right]`, -1 meaning open;
            p = i + Skv - Sq. Combines with any mask.
        softcap: cap > 0: scores become `cap * tanh(score / cap)` before masking (Gemma 2); 1e-30 to 1e30 (1e-290 to
            1e290 for float64).
        q_lengths, kv_lengths: int32 `[B]` on q's device: queries and keys past them are not there, and the causal
            alignment is by them: p = i + kv_lengths[b] - q_lengths[b]. Never read on the host. Values outside of
            0..S are clamped.
        return_lse: also return the log-sum-exp of each row, `[B, Hq, Sq]` (float32; float64 for float64 inputs;
            natural logarithm, sinks included; -inf in rows that see nothing).
        backend: "decode", "cudnn", "torch" or "reference" to insist on one.

    Returns:
        `[B, Hq, Sq, Dv]` in the promoted dtype, laid out in memory as `[B, Sq, Hq, Dv]`; with return_lse a pair. A row
        that may see nothing gives 0, and so do its gradients. What keys that no query sees hold (NaN included) reaches
        nothing. Softmax and accumulation are float32 (float64 for
        float64). Gradients exist for q, k, v, sinks and an additive mask.

    Raises:
        ValueError: an argument is not as described; the message names it. Also when the backend asked for, or every
            allowed backend, refuses the call.
        TypeError: an argument that must be a tensor is none.
    """
    arguments = (q, k, v, scale, mask, sinks, window, softcap, q_lengths, kv_lengths, return_lse)
    name = fast_path.name_of(*arguments, backend)
    found = None if name is None else fast_path.run(name, *arguments)
    if found is None:
        call = prepare(*arguments)
        names = dispatch.allowed() if backend is None else dispatch.check_names((backend,), "backend")
        found = ops.attention(call, names)
        if name is not None:
            fast_path.remember(name, call, names)
    out, lse = found
    return (out, lse) if return_lse and lse is not None else out


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the others do not. Printing it gives a table."""

    problem: Problem
    chosen: str | None  #: None when every allowed backend refuses
    reasons: dict[str, list[str]]  #: backend -> refusals, empty when it can serve the call

    def __str__(self) -> str:
        width = max(len(name) for name in dispatch.NAMES)
        lines = []
        for name, why in self.reasons.items():
            state = "serves this call" if name == self.chosen else "could serve it, comes later in the list"
            lines.append(f"{'->' if name == self.chosen else '  '} {name:<{width}}  {'; '.join(why) or state}")
        absent = "not allowed here (use_backend, backend=, FASTATTN_BACKENDS or FASTATTN_CUDNN)"
        lines += [f"   {name:<{width}}  {absent}" for name in dispatch.NAMES if name not in self.reasons]
        return "\n".join(lines)


def explain(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Explanation:
    """Which backend would serve `scaled_dot_product_attention` with these arguments, and why not the others.

    Takes the op's arguments, computes nothing. Raises what the op would raise on bad arguments; a call that no allowed
    backend can serve is explained rather than raised (`chosen` is None).
    """
    name = arguments.pop("backend", None)
    call = prepare(q, k, v, **arguments)
    names = dispatch.allowed() if name is None else dispatch.check_names((name,), "backend")
    problem = Problem.of(call)
    refusals = dispatch.reasons(problem, names)
    chosen = next((name for name, why in refusals.items() if not why), None)
    return Explanation(problem, chosen, refusals)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: Mask = None,
    sinks: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Call:
    """Validates the op's arguments and brings them into one form. Raises as the op does, before any launch."""
    check_inputs(q, k, v)
    if not torch.compiler.is_compiling() and torch_internals.transforms_active():
        raise ValueError("q: expected a tensor outside of torch.func's transforms: vmap, grad, jvp are not supported")
    q, k, v = _one_dtype(q, k, v)
    given = scale is not None
    scale = 1.0 / math.sqrt(q.shape[3] or 1) if scale is None else check_scale(scale, q.dtype)
    left, right = (-1, -1) if window is None else check_window(window)
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask: expected None, "causal", a tensor, Intervals or Segments, got {mask!r}')
        right = 0 if right < 0 else min(right, 0)
        mask = None
    lo = hi = segments = None
    if isinstance(mask, Segments):
        segments = check_segments(mask, q, k)
        if q_lengths is not None or kv_lengths is not None:
            raise ValueError("mask: Segments say how long each sequence is: expected no q_lengths or kv_lengths beside")
        if mask.causal:
            right = 0
        mask = None
    if mask is not None:
        mask, lo, hi = check_mask(mask, q, k)
    if sinks is not None:
        check_sinks(sinks, q)
    if q_lengths is not None:
        check_lengths("q_lengths", q_lengths, q)
    if kv_lengths is not None:
        check_lengths("kv_lengths", kv_lengths, q)
    if scale <= 0.0:  # kernels track the row's maximum before they scale, which needs a positive scale
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    if given and scale < (least := LIMITS[work_dtype(q.dtype)][0]):
        # In float32 it would be 0 sooner or later, and 0 * -inf is NaN: q takes what is missing.
        q, scale = q * (scale / least), least
    cap = 0.0 if softcap is None else check_softcap(softcap, q.dtype)
    grads = _wanted(q, k, v, mask, sinks) if torch.is_grad_enabled() else ""
    return Call(
        q,
        k,
        v,
        mask,
        lo,
        hi,
        sinks,
        q_lengths,
        kv_lengths,
        segments,
        scale,
        left,
        right,
        cap,
        check_flag("return_lse", return_lse),
        grads,
    )


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Promotes mixed dtypes; under autocast casts as torch's attention, which is on autocast's lower-precision list."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        dtype = torch.get_autocast_dtype(device)
    elif q.dtype == k.dtype == v.dtype:
        return q, k, v
    else:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _wanted(*tensors: Tensor | None) -> str:
    return "".join(n for n, x in zip("qkvms", tensors, strict=True) if x is not None and x.requires_grad)
