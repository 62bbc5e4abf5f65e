"""Calls of torch's `scaled_dot_product_attention` as data, and what they give: torch's math kernel in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from served import Served
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import drop_in

TORCHS = torch._C._nn.scaled_dot_product_attention
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: The largest error of an output and of a gradient, as norm of the difference over the norm.
ERRORS = {BF16: (5e-3, 1e-2), FP16: (8e-4, 2e-3), FP32: (1e-5, 2e-5), FP64: (1e-12, 1e-11)}


@dataclass(frozen=True)
class TorchCall:
    """One call.

    mask: None, "bool" or "float" (in q's dtype, with some -inf), "float32", each with a shape behind: "bool:1,1,3,5".
    """

    q: tuple[int, ...] = (2, 4, 6, 8)
    k: tuple[int, ...] = (2, 4, 9, 8)
    v: tuple[int, ...] = ()  #: (): as k
    mask: str | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    dtype: torch.dtype = FP32
    layout: str = "contiguous"  #: see LAYOUTS
    fully_masked: bool = False  #: the mask hides all keys from some queries

    def __str__(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if _differs(self, f)]
        return " ".join(parts).replace("torch.", "").replace(" ", "") or "plain"

    def but(self, **changes: Any) -> TorchCall:
        return dataclasses.replace(self, **changes)


def _differs(call: TorchCall, field: Any) -> bool:
    return bool(getattr(call, field.name) != field.default)


def _garbage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def _within(x: Tensor, shape: tuple[int, ...], place: Any) -> Tensor:
    """x as a part of memory that is otherwise NaN."""
    memory = _garbage(shape, x.dtype)
    memory[place] = x
    return memory[place]


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() > 2 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "token-major": _token_major,
    "every second value": lambda x: _within(x, (*x.shape[:-1], 2 * x.shape[-1]), (..., slice(None, None, 2))),
    "part of longer rows": lambda x: _within(x, (*x.shape[:-1], x.shape[-1] + 3), (..., slice(1, -2))),
    "part of a longer cache": lambda x: _within(
        x, (*x.shape[:-2], x.shape[-2] + 5, x.shape[-1]), (..., slice(2, -3), slice(None))
    ),
    "transposed": lambda x: x.mT.contiguous().mT,
    "not aligned": lambda x: _within(x.flatten(), (x.numel() + 1,), slice(1, None)).view(x.shape),
    "first dim last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        found = [self.q, self.k, self.v]
        return found if self.mask is None else [*found, self.mask]

    def leaves(self) -> list[Tensor]:
        return [x for x in self.tensors() if x.dtype != torch.bool]

    def call(self, function: Callable[..., Tensor]) -> Tensor:
        return function(self.q, self.k, self.v, self.mask, **self.options)

    def fresh(self, dtype: torch.dtype | None = None, grads: bool = True) -> Inputs:
        """The same values in leaves of their own, in the same layout, or contiguous in another dtype."""
        if dtype is None:
            made = [x.detach() for x in self.tensors()]
        else:
            made = [x.detach().clone() if x.dtype == torch.bool else x.detach().to(dtype) for x in self.tensors()]
        made = [x.requires_grad_(grads) if x.is_floating_point() else x for x in made]
        return Inputs(*made[:3], made[3] if len(made) > 3 else None, self.options)


def make(call: TorchCall) -> Inputs:
    lay = LAYOUTS[call.layout]
    q, k, v = (lay(torch.randn(shape).to(call.dtype)) for shape in (call.q, call.k, call.v or call.k))
    mask = None
    if call.mask is not None:
        kind, _, dims = call.mask.partition(":")
        shape = tuple(int(n) for n in dims.split(","))
        seen = torch.rand(shape) < 0.6
        seen[..., 0] = True
        if call.fully_masked:
            seen[..., 1, :] = False
        mask = lay(seen) if kind == "bool" and not call.layout.startswith(("every", "part", "not")) else seen
        if kind != "bool":
            dtype = FP32 if kind == "float32" else call.dtype
            mask = lay(torch.randn(shape).to(dtype).masked_fill(~seen, -math.inf))
    options: dict[str, Any] = {"is_causal": call.is_causal, "scale": call.scale, "enable_gqa": call.enable_gqa}
    return Inputs(q, k, v, mask, options)


def truth(inputs: Inputs) -> Tensor:
    """torch's math kernel in float64."""
    with sdpa_kernel(SDPBackend.MATH):
        return inputs.fresh(FP64, grads=False).call(TORCHS)


def error(found: Tensor, want: Tensor) -> float:
    """NaN where there is one in what was found."""
    size = want.norm().item()
    return (found.double() - want).norm().item() / (size if size > 1e-9 else 1.0)


def assert_right(found: Tensor, want: Tensor, dtype: torch.dtype, gradient: bool = False) -> None:
    assert found.shape == want.shape
    assert found.dtype == dtype
    assert error(found, want) <= ERRORS[dtype][gradient], error(found, want)


#: Ways through the drop-in: to torch's own function, or through the op on the backends named.
WAYS = {"torch": (), "reference": ("reference",)}


@contextmanager
def way(name: str, calls: int = 1) -> Iterator[None]:
    """Within the block calls take that way; there are as many, and nobody else serves one."""
    served, handed = Served(), sum(fastattn.stats()["handed_to_torch"].values())
    if WAYS[name]:
        with fastattn.use_backend(*WAYS[name]):
            yield
    else:
        yield
    forwards = {name: count for name, count in served().items() if not name.endswith(".backward")}
    handed = sum(fastattn.stats()["handed_to_torch"].values()) - handed
    assert (forwards, handed) == (({name: calls}, 0) if WAYS[name] else ({}, calls))


def check(call: TorchCall, name: str) -> Tensor:
    """Runs a call that way and compares with the truth. Returns the output."""
    inputs = make(call)
    want = truth(inputs)
    with torch.no_grad(), way(name):
        found = inputs.call(drop_in.scaled_dot_product_attention)
    assert_right(found, want, call.dtype)
    return found


def check_gradients(call: TorchCall, name: str) -> None:
    """The same with the gradients of all inputs that can have one."""
    inputs = make(call)
    double = inputs.fresh(FP64)
    with sdpa_kernel(SDPBackend.MATH):
        want = double.call(TORCHS)
    grad_out = torch.randn(want.shape).to(call.dtype)
    wants = torch.autograd.grad(want, double.leaves(), grad_out.double())
    own = inputs.fresh()
    with way(name):
        found = own.call(drop_in.scaled_dot_product_attention)
    assert_right(found, want, call.dtype)
    for leaf, gradient, right in zip(
        own.leaves(), torch.autograd.grad(found, own.leaves(), grad_out), wants, strict=True
    ):
        assert gradient.shape == leaf.shape
        assert_right(gradient, right, leaf.dtype, gradient=True)


@pytest.fixture
def default_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no variable of fastattn's were set."""
    for variable in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET", "FASTATTN_DEBUG"):
        monkeypatch.delenv(variable, raising=False)


class TinyBlock(torch.nn.Module):
    """Code as research code is: a projection, torch's function, a projection."""

    def __init__(self, dim: int = 16, heads: int = 2, is_causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.heads, self.is_causal = heads, is_causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(found.transpose(1, 2).reshape(batch, length, dim))


def distributed_step(patched: bool) -> dict[str, Any]:
    """One step under DistributedDataParallel on this rank: the gradients, and who served."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(TinyBlock())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(rank))
    served = Served()
    if patched:
        drop_in.patch()
    try:
        with fastattn.use_backend("reference"):
            model(x).square().sum().backward()
    finally:
        drop_in.unpatch()
    return {"grads": [p.grad for p in model.parameters()], "served": served()}
