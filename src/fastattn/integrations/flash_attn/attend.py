"""The op in flash-attn's layout, with its dropout and its `deterministic`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._compat import torch as torch_internals
from ...api import scaled_dot_product_attention
from ...common.checks import check_flag
from ...masks import Intervals, Segments
from ...validation import Arguments
from . import alibi, dropout
from .arguments import Options, renamed


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    dropout_p: float = 0.0,
    mask: Intervals | Segments | None = None,
    bias: alibi.Alibi | None = None,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over `[B, S, H, D]`: the output `[B, Sq, Hq, Dv]`, contiguous, and the log-sum-exp `[B, Hq, Sq]` if
    it is asked for. A bias excludes a mask."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    given: Any = mask if bias is None else bias.mask
    if dropout_p and q.numel() and k.numel():
        arguments = Arguments(q, k, v, given, window=options.window, q_lengths=q_lengths, kv_lengths=kv_lengths)
        return dropout.attend(arguments, options.scale, dropout_p).transpose(1, 2).contiguous(), None
    found = scaled_dot_product_attention(
        q,
        k,
        v,
        scale=options.scale,
        mask=given,
        sinks=options.sinks,
        window=options.window,
        softcap=options.softcap,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        return_lse=return_lse,
    )
    if isinstance(found, Tensor):
        return found.transpose(1, 2), None
    out, lse = found
    if bias is not None and bias.missing is not None:
        lse = lse + bias.missing
    return out.transpose(1, 2), lse


def attend_with_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    slopes: Tensor | None,
    leftpad: Tensor | None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attend` over batches `[B, S, H, D]` of which rows have their first tokens alone, as the op's lengths say, and no
    keys before leftpad (int32 `[B]`). slopes: ALiBi's, `[Hq]` or `[B, Hq]`."""
    mask = bias = None
    if slopes is not None:
        sizes = q.shape[1], k.shape[1]
        bias = alibi.bias(slopes, *sizes, q.dtype, options, q_lengths, kv_lengths, leftpad)
    elif leftpad is not None:
        lo = leftpad[:, None]
        mask = Intervals(lo, torch.full_like(lo, k.shape[1]))
    return attend(
        q,
        k,
        v,
        options,
        dropout_p=dropout_p,
        mask=mask,
        bias=bias,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        return_lse=return_lse,
    )


def check_dropout_alone(dropout_p: float, options: Options, return_attn_probs: bool, return_lse: bool) -> None:
    """Raises ValueError for what torch's kernels do not have beside dropout."""
    if not dropout_p:
        return
    for name, given in (
        ("softcap", options.softcap is not None),
        ("learnable_sink", options.sinks is not None),
        ("return_attn_probs", return_attn_probs),
        ("return_lse", return_lse),
    ):
        if given:
            raise ValueError(f"dropout_p: expected 0 together with {name}, which torch's kernels do not have")


Compute = Callable[..., tuple[Tensor, Tensor | None]]


def run(
    compute: Compute,
    deterministic: Any,
    names: tuple[str, str, str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """compute(q, k, v, *others). names: how the caller knows q, k and v: what is raised about one names it so."""
    check_flag("deterministic", deterministic)
    try:
        return (_deterministically if deterministic else _at_once)(compute, q, k, v, *others)
    except (ValueError, TypeError) as error:
        better = renamed(error, q, k, v, names)
        if better is error:
            raise
        raise better from None


def _at_once(compute: Compute, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return compute(*tensors)


def returned(out: Tensor, lse: Tensor | None, probs: bool, return_lse: bool) -> Any:
    """What flash-attn returns: `out`, `(out, softmax_lse)`, or with return_attn_probs `(out, softmax_lse, S_dmask)`, of
    which the last is empty, as flash-attn's is without dropout."""
    if probs:
        return out, lse, out.new_empty(0)
    return (out, lse) if return_lse else out


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch's deterministic algorithms in this block. Another thread's operators without one only warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _deterministically(compute: Compute, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """compute(*tensors) so that its backward, too, runs with torch's deterministic algorithms.

    Raises ValueError under torch.compile, which cannot trace it.
    """
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not trained or torch.are_deterministic_algorithms_enabled():  # a forward is deterministic
        return compute(*tensors)
    if torch.compiler.is_compiling():
        raise ValueError(
            "deterministic: expected False under torch.compile: call torch.use_deterministic_algorithms(True) before"
        )
    found = _Deterministic.apply(compute, *tensors)
    return found if isinstance(found, tuple) else (found, None)


class _Deterministic(torch.autograd.Function):
    """A piece of a graph whose backward runs under a setting: its own graph is inside."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *tensors: Tensor | None) -> Any:
        inside = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
        with torch.enable_grad(), deterministic_algorithms():
            found = [x for x in compute(*inside) if x is not None]
        ctx.inside, ctx.found = inside, found
        ctx.set_materialize_grads(False)
        out = tuple(x.detach() for x in found)
        return out if len(out) > 1 else out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.inside is None:
            raise RuntimeError(
                "deterministic: trying to backward through the graph a second time: "
                "expected retain_graph=True the first time"
            )
        inside = ctx.inside
        wanted = [x for x in inside if x is not None and x.requires_grad]
        pairs = [(x, gradient) for x, gradient in zip(ctx.found, grads) if gradient is not None]
        with deterministic_algorithms():
            outputs, upstream = [x for x, _ in pairs], [gradient for _, gradient in pairs]
            retained = torch_internals.graph_is_retained()
            found = iter(torch.autograd.grad(outputs, wanted, upstream, retain_graph=retained, allow_unused=True))
        if not retained:
            ctx.inside = ctx.found = None  # its memory is not to live as long as the loss
        return (None, *(next(found) if x is not None and x.requires_grad else None for x in inside))
