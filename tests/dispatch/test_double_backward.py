"""Gradients of gradients, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn

attend = fastattn.scaled_dot_product_attention


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double).requires_grad_()


def hidden_row() -> Tensor:
    mask = torch.ones(3, 4, dtype=torch.bool).tril()
    mask[1] = False
    return mask


#: The op as a function of tensors, and how many it takes besides q, k, v.
CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda q, k, v: attend(q, k, v),
    "causal": lambda q, k, v: attend(q, k, v, mask="causal"),
    "a fully masked row": lambda q, k, v: attend(q, k, v, mask=hidden_row()),
    "intervals": lambda q, k, v: attend(
        q,
        k,
        v,
        mask=fastattn.Intervals(
            torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[2, 1, 4]], dtype=torch.int32)
        ),
    ),
    "lengths": lambda q, k, v: attend(q, k, v, mask="causal", kv_lengths=torch.tensor([2], dtype=torch.int32)),
    "window and softcap": lambda q, k, v: attend(q, k, v, window=(1, 0), softcap=2.0),
    "negative scale": lambda q, k, v: attend(q, k, v, scale=-0.5),
    "one tensor": lambda q, k, v: attend(k, k, k),
    "keys as values": lambda q, k, v: attend(q, k, k),
    "queries alone": lambda q, k, v: attend(q, k.detach(), v.detach()),
    "values alone": lambda q, k, v: attend(q.detach(), k.detach(), v),
    "not all of the first": lambda q, k, v: attend(q, k, v).select(2, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives(call: str) -> None:
    inputs = leaf(1, 2, 3, 3), leaf(1, 1, 4, 3), leaf(1, 1, 4, 3)
    used = [x for x in inputs if torch.autograd.grad(CALLS[call](*inputs).sum(), x, allow_unused=True)[0] is not None]

    def function(*some: Tensor) -> Tensor:
        given = iter(some)
        return CALLS[call](*(next(given) if any(x is one for one in used) else x for x in inputs))  # type: ignore[no-any-return]

    assert torch.autograd.gradgradcheck(function, used)


def test_second_derivatives_of_masks_and_sinks() -> None:
    q, k, v = leaf(1, 2, 3, 3), leaf(1, 1, 4, 3), leaf(1, 1, 4, 3)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, mask, sinks: attend(q, k, v, mask=mask, sinks=sinks), (q, k, v, leaf(1, 2, 1, 4), leaf(2))
    )


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0), (0, 0)])
def test_of_nothing(queries: int, keys: int) -> None:
    """Of calls without queries or keys: zeros, not an error."""
    inputs = [leaf(1, 2, queries, 3), leaf(1, 1, keys, 3), leaf(1, 1, keys, 3)]
    for _ in range(2):
        out = attend(*inputs)
        grad_out = torch.ones_like(out, requires_grad=True)
        first = torch.autograd.grad(out, inputs, grad_out, create_graph=True)
        for one in (*inputs, grad_out):
            (found,) = torch.autograd.grad(sum(x.square().sum() for x in first), one, retain_graph=True)
            assert torch.equal(found, torch.zeros_like(one))


def test_third_derivatives() -> None:
    def second(q: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(attend(q, q, q, mask="causal").square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, leaf(1, 2, 3, 3))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_after_any_backend_and_dtype(backend: str) -> None:
    """And under autocast, whose casts are outside of the op."""
    found = []
    for dtype in (torch.float32, torch.double):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 5, 8).to(dtype).requires_grad_() for _ in "qkv")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            out = attend(q, k, v, backend=backend if dtype == torch.float32 else None)
        first = torch.autograd.grad(out.to(dtype).square().sum(), (q, k, v), create_graph=True)
        sum(x.square().sum() for x in first).backward()
        assert q.grad.dtype == dtype
        found.append([x.grad.double() for x in (q, k, v)])
    for mine, want in zip(*found, strict=True):
        assert (mine - want).norm() <= 3e-2 * want.norm()
