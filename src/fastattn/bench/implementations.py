"""The implementations of an attention call: fastattn and each of torch's kernels; `peers.py` has other packages'."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._compat import torch as torch_internals
from .._compat.sdpa import scaled_dot_product_attention as torch_attention
from ..api import scaled_dot_product_attention
from .case import Case
from .inputs import DTYPE, Inputs
from .layouts import Operands, from_packed, to_packed

MOST_SCORES = 2 << 30  #: bytes of the largest matrix of scores that torch's math may allocate


class Refusal(ValueError):
    """An implementation cannot do a call at all: nothing is wrong with it."""


@dataclass(frozen=True)
class Implementation:
    """A library's attention, or one of its kernels."""

    name: str
    binder: Callable[[Case, Inputs], Callable[[], Tensor]]  #: see `bind`
    plans: str | None = None  #: FASTATTN_PLANS while it is called
    backend: SDPBackend | None = None  #: of torch's, while it is called
    package: str | None = None  #: the package it is from, by its name on PyPI, if that is not torch
    needs_cuda: bool = False
    softcap: bool = False  #: whether it has one
    #: It takes the times itself, elsewhere: the output for the first of the sets, and what an entry of a row says.
    measure: Callable[[Case, Sequence[Inputs]], tuple[Tensor, dict[str, Any]]] | None = None

    def bind(self, case: Case, x: Inputs) -> Callable[[], Tensor]:
        """The call, its arguments looked up. Raises `Refusal`."""
        if case.softcap and not self.softcap:
            raise Refusal("it has no softcap")
        return self.binder(case, x)

    @property
    def ours(self) -> bool:
        return self.plans is not None

    @property
    def cuda_only(self) -> bool:
        return self.backend is not None or self.needs_cuda

    @contextmanager
    def active(self, gradients: bool = False) -> Iterator[None]:
        """What has to be in force while it is called. Without `gradients`: inference mode."""
        with ExitStack() as stack:
            if not gradients:
                stack.enter_context(torch.inference_mode())
            if self.plans is not None:
                stack.enter_context(variable("FASTATTN_PLANS", self.plans))
            if self.backend is not None:
                stack.enter_context(sdpa_kernel(self.backend))
            yield


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for the time of the block."""
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def bind_fastattn(case: Case, x: Inputs, **more: Any) -> Callable[[], Any]:
    """fastattn's call; more: of its options."""
    options: dict[str, Any] = dict(more)
    if x.segments is not None:
        options["mask"] = x.segments
    elif case.additive:
        options["mask"] = x.mask
    elif case.q_len > 1:
        options["mask"] = "causal"
    if case.left >= 0:
        options["window"] = case.left, 0
    if x.sinks is not None:
        options["sinks"] = x.sinks
    if case.softcap:
        options["softcap"] = case.softcap
    if x.lengths is not None:
        options["kv_lengths"] = x.lengths
    return partial(scaled_dot_product_attention, x.q, x.k, x.v, **options)


def mask_by_shape(q_len: int, kv_len: int) -> Any:
    """torch's own kind of mask, causal to the lower right: no tensor."""
    from torch.nn.attention.bias import causal_lower_right  # it imports torch.compile, for a second

    return causal_lower_right(q_len, kv_len)


def _bind_torch(case: Case, x: Inputs, lower_right: bool = False) -> partial[Tensor]:
    """torch's attention. lower_right: its own kind of mask for that instead of a tensor."""
    if case.sinks or (case.left >= 0 and x.mask is None):
        raise Refusal("torch's attention has neither sinks nor windows")
    options: dict[str, Any] = {"enable_gqa": True} if case.q_heads != case.kv_heads else {}
    if x.mask is not None:
        by_shape = lower_right and not (x.lengths is not None or case.left >= 0 or case.padding or case.additive)
        options["attn_mask"] = mask_by_shape(case.q_len, case.kv_len) if by_shape else x.mask
    elif case.q_len > 1:
        options["is_causal"] = True
    return partial(torch_attention, x.q, x.k, x.v, **options)


def _bind_efficient(case: Case, x: Inputs) -> Callable[[], Tensor]:
    """torch's memory-efficient kernel has no grouped heads: what its user does about it is part of the call."""
    if case.q_heads == case.kv_heads:
        return _bind_torch(case, x)
    call = _bind_torch(replace(case, kv_heads=case.q_heads), x)
    return partial(repeated, case.q_heads // case.kv_heads, *call.args, **call.keywords)


def repeated(times: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's attention without grouped heads."""
    return torch_attention(q, *(t.repeat_interleave(times, 1) for t in (k, v)), **options)


def _bind_flash(case: Case, x: Inputs) -> Callable[[], Tensor]:
    if case.packed is not None:
        return _bind_varlen(case, x)
    if case.sinks or (case.left >= 0 and case.q_len == 1):
        return partial(flash_with_sinks, x.q, *_window(case, x), _some_sinks(x))
    return _bind_torch(case, x, lower_right=True)


def _bind_varlen(case: Case, x: Inputs) -> Callable[[], Tensor]:
    """torch's own call for packed sequences, on its flash kernel."""
    if case.sinks or case.left >= 0 or case.packed is None:
        raise Refusal("torch's varlen_attn takes packed sequences without sinks and windows only")
    return varlen(x, max(case.packed))


def varlen(x: Operands, longest: int) -> Callable[[], Any]:
    """torch's own call for packed sequences, causal."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # it has changed from one torch to the next
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if x.q.shape[1] != x.k.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    sizes: tuple[Any, ...] = x.starts, x.starts, longest, longest
    attend: Callable[..., Any] = varlen_attn
    return lambda: from_packed(attend(*to_packed(x), *sizes, **options))


def flash_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """The log-sum-exp, which torch's public function does not give, says how much the sink takes off."""
    out, lse = torch_internals.flash_attention(q, k, v, causal=q.shape[2] > 1)
    return with_sinks(out, lse, sinks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The output of a call with sinks from that of one without, and its log-sum-exp."""
    return out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)


def _bind_math(case: Case, x: Inputs) -> Callable[[], Tensor]:
    """torch without a kernel of its own: plain tensor operations."""
    if case.sinks or (case.left >= 0 and case.q_len == 1):
        return partial(_plain_with_sinks, x.q, *_window(case, x, several=False), _some_sinks(x))
    scores = case.batch * case.q_heads * case.q_len * case.kv_len * DTYPE.itemsize
    if scores > MOST_SCORES:
        raise Refusal(f"its matrix of scores would take {scores / 1e9:.0f} GB")
    return partial(_as_math, _bind_torch(case, x))


def _as_math(call: Callable[[], Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return call()


def _plain_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Plain torch, for one query: the heads of a group are rows of one matrix, the sinks one more column."""
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    scores = (rows @ k.mT).float().view(batch, heads, 1, -1) / math.sqrt(dim)
    column = sinks.float()[None, :, None, None].expand(batch, heads, 1, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(q.dtype)
    return (weights.reshape(batch, k.shape[1], rows.shape[2], -1) @ v).view(batch, heads, 1, dim)


def _window(case: Case, x: Inputs, several: bool = True) -> tuple[Tensor, Tensor]:
    """The keys and values that one query sees: the best that torch can do with a window."""
    whole = several and case.left < 0 and case.q_len == case.kv_len and x.mask is None
    if (case.q_len > 1 and not whole) or case.lengths is not None:
        raise Refusal("expected one query, or as many as keys without a window, and no lengths")
    first = max(0, case.kv_len - 1 - case.left) if case.left >= 0 else 0
    return x.k[:, :, first:], x.v[:, :, first:]


def _some_sinks(x: Inputs) -> Tensor:
    return x.q.new_full((x.q.shape[1],), -torch.inf) if x.sinks is None else x.sinks


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("fastattn", bind_fastattn, plans="auto", softcap=True),
        Implementation("fastattn-dynamic", bind_fastattn, plans="dynamic", softcap=True),
        Implementation("fastattn-static", bind_fastattn, plans="static", softcap=True),
        Implementation("torch-cudnn", _bind_torch, backend=SDPBackend.CUDNN_ATTENTION),
        Implementation("torch-flash", _bind_flash, backend=SDPBackend.FLASH_ATTENTION),
        Implementation("torch-efficient", _bind_efficient, backend=SDPBackend.EFFICIENT_ATTENTION),
        Implementation("torch-math", _bind_math),
    )
}
