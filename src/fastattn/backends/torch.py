"""torch's own kernels, where they compute exactly what was asked: the CPU, fp32, and what other backends refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import masks, reference
from .._compat import sdpa as torchs
from .._compat import torch as torch_internals
from ..call import Call, Gradients, Problem, as_token_major
from .base import Kernel
from .layout import copied, readable

#: What stands for an infinite number in a key: as good as one in a score, and its parts and products are finite.
_INFINITE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: torch.finfo(torch.float16).max}
_COARSE = 256.0  #: a bias beyond which float32 rounds a score, and the log-sum-exp, by more than results are rounded
#: A dense mask larger than this (elements) is not made for torch's kernels: the reference needs memory O(S) instead.
MAX_MASK_ELEMENTS = 1 << 28


class TorchBackend:
    """`torch.nn.functional.scaled_dot_product_attention`, with masks and lengths as one dense mask."""

    name = "torch"
    gives_lse = False
    reads_lse = False

    def reasons(self, problem: Problem) -> list[str]:
        p, why = problem, []
        if p.dtype == torch.float64:
            why.append("float64 is the reference's")
        if p.empty:
            why.append("no queries or no keys")
        if p.softcap:
            why.append("torch's kernels have no softcap")
        if p.sinks:
            why.append("torch's kernels have no sinks")
        if p.return_lse:
            why.append("torch's kernels do not return the log-sum-exp")
        if p.grads and not torch_internals.HAS_AUTOGRAD_WITHIN:
            why.append("this torch does not let an operator compute gradients with autograd")
        if "m" in p.grads:
            why.append("torch's fused kernels have no gradient for the mask")
        if _needs_mask(p) and p.batch * p.q_len * p.kv_len > MAX_MASK_ELEMENTS:
            why.append(f"would need a dense mask of {p.batch} x {p.q_len} x {p.kv_len}")
        return why

    def bind(self, problem: Problem, call: Call) -> Kernel:
        return _TorchKernel(problem)


class _TorchKernel:
    __slots__ = ("_problem",)

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def forward(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return as_token_major(_attend(self._problem, call, call.q, call.k, call.v), self._problem.dtype), None

    def forward_for_backward(self, call: Call) -> tuple[Tensor, Callable[[Call, Tensor], Gradients]]:
        """The output, and its backward for one use: it keeps what torch's autograd saved of the forward.

        torch's public function keeps its own log-sum-exp to itself: without that graph the forward has to run again.
        """
        p, inputs = self._problem, self._leaves(call)
        with torch_internals.autograd_within(), torch.enable_grad():
            out = _attend(p, call, *inputs)
        return as_token_major(out.detach(), p.dtype), partial(self._gradients, inputs, out)

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        inputs = self._leaves(call)
        with torch_internals.autograd_within(), torch.enable_grad():
            again = _attend(self._problem, call, *inputs)
        return self._gradients(inputs, again, call, grad_out)

    def _leaves(self, call: Call) -> list[Tensor]:
        return [getattr(call, name).detach().requires_grad_(name in self._problem.grads) for name in "qkv"]

    def _gradients(self, inputs: list[Tensor], out: Tensor, call: Call, grad_out: Tensor) -> Gradients:
        p = self._problem
        if p.device == "cpu" and _drowns(p, call):
            return reference.backward(p, call, grad_out, None)
        wanted = [x for x in inputs if x.requires_grad]
        with torch_internals.autograd_within():
            grad_out = readable(grad_out) if p.device == "cuda" else grad_out
            found = iter(torch.autograd.grad(out, wanted, grad_out))
        return Gradients(*(as_token_major(next(found), x.dtype) if x.requires_grad else None for x in inputs))


def _drowns(p: Problem, call: Call) -> bool:
    """Whether scores of some row drown in its bias, finfo.min or -1e9 for all keys that it sees. The log-sum-exp, from
    which torch's backward computes the probabilities, has no bits left for the number of keys then, and the gradients
    are too large by it (measured, 2.13). Reads data: not for a GPU, where other backends come first."""
    if p.mask != "additive" or call.mask is None or not (call.mask.isfinite() & (call.mask.abs() > _COARSE)).any():
        return False
    seen = masks.visibility(call)
    bias = call.mask if seen is None else torch.where(seen, call.mask, -torch.inf)
    top = bias.amax(-1)
    return bool((top.isfinite() & (top.abs() > _COARSE)).any())


def _needs_mask(p: Problem) -> bool:
    """False when torch's own arguments (nothing, or is_causal) say it all. torch's causal is upper-left aligned."""
    if p.mask != "none" or p.q_lengths or p.kv_lengths or p.left >= 0:
        return True
    return p.right >= 0 and not (p.causal and (p.q_len == p.kv_len or p.q_len == 1))


def _without_infinities(k: Tensor, trained: bool) -> Tensor:
    """Keys whose infinities, which are legal (a score of -inf takes a key out), are numbers so large that they do the
    same. torch's memory-efficient kernel multiplies float32 as three products of TF32: it splits x in what TF32 holds
    and the rest, and the rest of -inf is -inf + inf, NaN. Other dtypes are multiplied as they are, but the backward of
    torch's kernels gives the values of such keys a gradient of NaN (measured, 2.11)."""
    if k.dtype != torch.float32 and not trained:
        return k
    large = _INFINITE[k.dtype]
    return k.nan_to_num(nan=torch.nan, posinf=large, neginf=-large)


def _overlapping(x: Tensor) -> bool:
    """Whether a token begins within the last one: the matrix product of torch's CPU kernel may read, and then compute
    with, memory that is nobody's (measured, 2.13 on an AMD processor)."""
    return x.shape[2] > 1 and 0 < x.stride(2) < x.shape[3] and x.stride(3) == 1


def _attend(p: Problem, c: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = fully_masked = None
    if _needs_mask(p):
        mask = masks.visibility(c)
        assert mask is not None
        unseen = masks.unseen_keys(c)
        k, v = masks.clear(k, unseen), masks.clear(v, unseen)
        if p.may_have_empty_rows:
            # Rows that see nothing are let see everything, so that no kernel divides by 0, and are cleared after.
            fully_masked = ~mask.any(-1, keepdim=True)
            mask, q = mask | fully_masked, masks.clear(q, fully_masked)
        if p.mask == "additive" and c.mask is not None:
            # torch wants the mask in q's dtype; rounding a float32 mask to bfloat16 would not be exact.
            work = torch.promote_types(p.dtype, c.mask.dtype)
            q, k, v, bias = q.to(work), k.to(work), v.to(work), c.mask.to(work)
            bias = bias if fully_masked is None else torch.where(fully_masked, 0.0, bias)
            mask = torch.where(mask, bias, -torch.inf)
    if p.device == "cuda":
        # Measured (2.11): rows that do not start at 16 bytes, and masks without a key dim of their own, end some of
        # torch's kernels in an illegal access; and a row of finfo.min is a row of nothing to them.
        q, k, v = readable(q), readable(_without_infinities(k, bool(p.grads))), readable(v)
        if mask is not None:
            mask = masks.in_base_2(mask) if p.mask == "additive" else mask
            mask = mask.expand(*mask.shape[:3], p.kv_len).contiguous()
    else:
        q, k, v = (copied(x) if _overlapping(x) else x for x in (q, k, v))
    out = torchs.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and p.causal and p.q_len > 1,
        scale=c.scale,
        enable_gqa=p.group > 1,
    )
    return masks.clear(out, fully_masked)
