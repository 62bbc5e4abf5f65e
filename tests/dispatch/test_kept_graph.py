"""Gradients by torch's kernels: the forward of an eager call is not run again for them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn._compat import sdpa
from fastattn._compat import torch as torch_internals

SHAPE = (2, 4, 33, 16)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The query of each call of torch's function."""
    seen: list[Tensor] = []
    real = sdpa.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **named: Any) -> Tensor:
        seen.append(q)
        return real(q, *args, **named)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", counted)
    return seen


def leaves(grads: str = "qkv") -> list[Tensor]:
    return [torch.randn(SHAPE).requires_grad_(name in grads) for name in "qkv"]


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    options = {"mask": "causal"} | options
    return fastattn.scaled_dot_product_attention(q, k, v, backend="torch", **options)


def truth(inputs: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor | None]:
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    naive.attention(*wide, scale=SHAPE[-1] ** -0.5, **options).out.backward(grad.double())
    return [x.grad for x in wide]


def compare(inputs: list[Tensor], expected: list[Tensor | None]) -> None:
    for x, want in zip(inputs, expected, strict=True):
        if want is None:
            assert x.grad is None
        else:
            assert x.grad is not None
            torch.testing.assert_close(x.grad.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grads", ["qkv", "q", "kv", "v"])
def test_one_forward_for_both(grads: str, forwards: list[Tensor]) -> None:
    attention(*leaves(grads)).sum().backward()  # bound
    inputs, grad = leaves(grads), torch.randn(SHAPE)
    forwards.clear()
    attention(*inputs).backward(grad)
    assert len(forwards) == 1
    compare(inputs, truth(inputs, grad, window=(-1, 0)))


def test_masks_and_rows_that_see_nothing(forwards: list[Tensor]) -> None:
    mask = torch.rand(2, 1, 33, 33) < 0.3
    mask[:, :, 5] = False
    for _ in range(2):
        inputs, grad = leaves(), torch.randn(SHAPE)
        forwards.clear()
        attention(*inputs, mask=mask).backward(grad)
    assert len(forwards) == 1
    compare(inputs, truth(inputs, grad, mask=mask))


def test_a_second_backward_runs_the_forward_again(forwards: list[Tensor]) -> None:
    attention(*leaves()).sum().backward()
    inputs, grad = leaves(), torch.randn(SHAPE)
    forwards.clear()
    out = attention(*inputs)
    out.backward(grad, retain_graph=True)
    assert len(forwards) == 1
    first = [x.grad.clone() for x in inputs if x.grad is not None]
    out.backward(grad)
    assert len(forwards) == 2
    for x, once in zip(inputs, first, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * once)


def test_what_is_kept_goes_with_the_first_backward() -> None:
    """Who holds the loss until the next step does not hold what attention saved."""
    attention(*leaves()).sum().backward()
    inputs = leaves()
    out = attention(*inputs)
    node = out.grad_fn
    assert node is not None
    kept = weakref.ref(node.of[2].args[1])
    assert kept() is not None
    out.sum().backward()
    gc.collect()
    assert kept() is None


def test_an_input_that_was_changed_is_noticed() -> None:
    attention(*leaves()).sum().backward()
    inputs = leaves()
    k = inputs[1] * 1.0
    out = attention(inputs[0], k, inputs[2])
    k.add_(1.0)
    with pytest.raises(RuntimeError, match=r"inplace|in-place"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    """What is computed again is computed once: nothing is kept there that asks for it a second time."""
    attention(*leaves()).sum().backward()
    inputs, grad, runs = leaves(), torch.randn(SHAPE), []

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs.append(q)
        return attention(q, k, v)

    checkpoint(function, *inputs, use_reentrant=reentrant).backward(grad)
    assert len(runs) == 2
    compare(inputs, truth(inputs, grad, window=(-1, 0)))


def test_without_torchs_word_on_hooks_nothing_is_kept(forwards: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    attention(*leaves()).sum().backward()
    monkeypatch.setattr(torch_internals, "_hooks", None)
    forwards.clear()
    attention(*leaves()).sum().backward()
    assert len(forwards) == 2


def test_hooks_of_saved_tensors() -> None:
    attention(*leaves()).sum().backward()
    inputs, grad = leaves(), torch.randn(SHAPE)
    with torch.autograd.graph.save_on_cpu():
        out = attention(*inputs)
    out.backward(grad)
    compare(inputs, truth(inputs, grad, window=(-1, 0)))


def test_gradients_of_gradients() -> None:
    attention(*leaves()).sum().backward()
    inputs = leaves()
    (first,) = torch.autograd.grad(attention(*inputs).square().sum(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), inputs[0])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = naive.attention(*wide, scale=SHAPE[-1] ** -0.5, window=(-1, 0)).out
    (want,) = torch.autograd.grad(out.square().sum(), wide[0], create_graph=True)
    (want,) = torch.autograd.grad(want.sum(), wide[0])
    torch.testing.assert_close(second.double(), want, atol=1e-4, rtol=1e-4)
