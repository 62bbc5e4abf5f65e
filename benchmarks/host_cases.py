"""What `benchmarks.host` times: kinds of calls, and links of autograd that do nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
import fastattn.drop_in

Run = Callable[[], Any]
OURS = ("fastattn", "drop-in")
#: Those of torch's kernels that a GPU has.
KERNELS = {
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Inputs:
    """Of one case."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    options: dict[str, Any]  #: of our function
    torchs: dict[str, Any] | None = None  #: of torch's; None: the same

    def for_torch(self) -> Inputs:
        """With torch's options."""
        return self if self.torchs is None else replace(self, options=self.torchs)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class HostCase:
    """A kind of call."""

    make: Callable[[torch.device], Inputs]
    ours: Callable[..., Any]
    torchs: Callable[..., Any] | None  #: None: torch has nothing like it
    dropped_in: Callable[..., Any] | None = None  #: torchs, on the drop-in
    plans: str = "dynamic"  #: FASTATTN_PLANS
    differentiated: bool = True
    compiled: bool = False  #: whether it is timed within torch.compile too
    torchs_on_a_cpu: bool = True  #: whether torch's is there


def _sizes(device: torch.device) -> tuple[int, int, int, int]:
    """Batch, heads, length, head dim."""
    return (2, 8, 128, 64) if device.type == "cuda" else (2, 2, 8, 8)


def _token_major(device: torch.device, length: int | None = None) -> Tensor:
    batch, heads, own, dim = _sizes(device)
    made = torch.randn(batch, length or own, heads, dim, device=device, dtype=torch.bfloat16)
    return made.transpose(1, 2)


def square(device: torch.device, **options: Any) -> Inputs:
    q, k, v, grad_out = (_token_major(device) for _ in range(4))
    return Inputs(q, k, v, grad_out, options)


def _decode(device: torch.device) -> Inputs:
    q, grad_out = (_token_major(device, 1) for _ in range(2))
    k, v = (_token_major(device).contiguous() for _ in range(2))
    return Inputs(q, k, v, grad_out, {})


def _lengths(device: torch.device) -> Inputs:
    batch, _, length, _ = _sizes(device)
    lengths = torch.linspace(length // 2, length, batch, device=device).int()
    x = square(device, kv_lengths=lengths)
    there = torch.arange(length, device=device) < lengths[:, None]
    return replace(x, torchs={"mask": there[:, None, None]})


def _masked(device: torch.device) -> Inputs:
    _, _, length, _ = _sizes(device)
    return square(device, mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril())


def _packed(device: torch.device) -> Inputs:
    batch, heads, length, dim = _sizes(device)
    tokens = batch * length
    q, k, v, grad_out = (torch.randn(tokens, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(4))
    cu = torch.tensor([0, length // 3, tokens], dtype=torch.int32, device=device)
    return Inputs(q, k, v, grad_out, {"cu": cu}, {"cu": cu, "longest": tokens - length // 3})


def _ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, **options)


def _ours_causal(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return fastattn.scaled_dot_product_attention(q, k, v, mask="causal")


def _ours_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Any:
    return fastattn.varlen_attention(q, k, v, cu, cu, causal=True)


def _function_of(function: Callable[..., Tensor], **fixed: Any) -> Callable[..., Tensor]:
    """A call of torch's function, or of the drop-in's."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return function(q, k, v, attn_mask=mask, **fixed)

    return call


def _torchs_packed() -> Callable[..., Any] | None:
    """Newer torch has it. On a GPU alone."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        causal: dict[str, Any] = {"is_causal": True}
    else:
        causal = {"window_size": (-1, 0)}

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Any:
        return varlen_attn(q, k, v, cu, cu, longest, longest, **causal)

    return call


_DROPPED_IN = fastattn.drop_in.scaled_dot_product_attention
_CAUSAL: dict[str, Any] = {
    "torchs": _function_of(sdpa, is_causal=True),
    "dropped_in": _function_of(_DROPPED_IN, is_causal=True),
}
_FULL: dict[str, Any] = {"torchs": _function_of(sdpa), "dropped_in": _function_of(_DROPPED_IN)}

CASES = {
    "dynamic plan": HostCase(square, _ours_causal, **_CAUSAL, compiled=True),
    "static plan": HostCase(square, _ours_causal, **_CAUSAL, plans="static"),
    "decode": HostCase(_decode, _ours, **_FULL, differentiated=False),
    "varlen": HostCase(_packed, _ours_packed, _torchs_packed(), torchs_on_a_cpu=False),
    "lengths": HostCase(_lengths, _ours, **_FULL),
    "dense mask": HostCase(_masked, _ours, **_FULL, compiled=True),
}
#: In which a forward is timed. "grad": gradients are on, and no input wants one.
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode
}  # fmt: skip


class Three(torch.autograd.Function):
    """The least that a link can do: three arguments, three saved tensors, three gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple([torch.empty_like(x) for x in ctx.saved_tensors])


class Eighteen(torch.autograd.Function):
    """The same with 18 arguments and 12 saved tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, *(q,) * 9)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *[torch.empty_like(x) for x in ctx.saved_tensors[:3]], *(None,) * 15


def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What autograd in C++ costs: one operator, whose gradients are two multiplications and its own."""
    return torch.addcmul(v, q, k)


def forward(function: Callable[..., Any], x: Inputs) -> Run:
    return partial(function, *x.tensors, **x.options)


def both(function: Callable[..., Any], x: Inputs) -> Run:
    """Forward and backward."""
    leaves = [y.detach().requires_grad_() for y in x.tensors]

    def run() -> Any:
        return torch.autograd.grad(function(*leaves, **x.options), leaves, x.grad_out)

    return run
