"""The backwards of torch's kernels by themselves: its operators, whose forwards have run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.timing import text_of
from fastattn.call import Call

Run = Callable[[], Any]


def torchs(names: Sequence[str], call: Call, grad_out: Tensor) -> dict[str, tuple[Run, Run]]:
    """The forward and the backward of those of torch's kernels ("cudnn", "flash", "efficient") that take the call;
    says why the others do not. None where torch's function has no such call."""
    found: dict[str, tuple[Run, Run]] = {}
    if not _has(call):
        return found
    for name in names:
        try:
            forward, backward = _bound(name, call, grad_out)
            backward()
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            print(f"torch {name}: {text_of(error)[:140]}", file=sys.stderr)
        else:
            found[name] = forward, backward
    return found


def _has(call: Call) -> bool:
    """Whether the call is one of torch's function: plain, causal, or with a tensor mask."""
    causal, square = call.right >= 0, call.q.shape[2] == call.k.shape[2]
    more = (call.lo, call.sinks, call.q_lengths, call.kv_lengths, call.segments, call.mask if causal else None)
    if call.softcap or call.left >= 0 or call.right > 0 or any(x is not None for x in more):
        return False
    return square or not causal  # torch's causal is aligned to the upper left


def _bound(name: str, call: Call, grad_out: Tensor) -> tuple[Run, Run]:
    q, k, v, scale, causal = call.q, call.k, call.v, call.scale, call.right == 0
    bias, wanted = call.mask, "m" in call.grads
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -torch.inf)
        bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    aten: Any = torch.ops.aten
    if name == "efficient":
        if q.shape[1] != k.shape[1]:  # it has no groups: on keys and values that were repeated before
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        forward = partial(aten._scaled_dot_product_efficient_attention, q, k, v, bias, True, 0.0, causal, scale=scale)
        o, lse, *seeds = forward()

        def efficient() -> Any:
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad_out, q, k, v, bias, o, lse, *seeds, 0.0, [True, True, True, wanted], causal, scale=scale
            )
            return grads[3].sum_to_size(call.mask.shape) if wanted and call.mask is not None else grads

        return forward, efficient
    if wanted or (name == "flash" and bias is not None):
        raise NotImplementedError("takes no such mask")
    if name == "flash":
        forward = partial(aten._scaled_dot_product_flash_attention, q, k, v, 0.0, causal, False, scale=scale)
        o, lse, cq, ck, mq, mk, seed, offset, _ = forward()
        return forward, partial(
            aten._scaled_dot_product_flash_attention_backward,
            grad_out, q, k, v, o, lse, cq, ck, mq, mk, 0.0, causal, seed, offset, scale=scale,
        )  # fmt: skip
    forward = partial(aten._scaled_dot_product_cudnn_attention, q, k, v, bias, True, 0.0, causal, False, scale=scale)
    o, lse, cq, ck, mq, mk, seed, offset, _ = forward()
    return forward, partial(
        aten._scaled_dot_product_cudnn_attention_backward,
        grad_out, q, k, v, o, lse, seed, offset, bias, cq, ck, mq, mk, 0.0, causal, scale=scale,
    )  # fmt: skip
