"""Calls under torch's modes, with inputs of unusual layouts and dtypes: what once went wrong without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor

import fastattn
from fastattn.backends import torch as torch_sdpa
from fastattn.backends.base import Refusal

pytestmark = pytest.mark.usefixtures("way")

attend = fastattn.scaled_dot_product_attention


def qkv(q_len: int = 20, kv_len: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len)))  # type: ignore[return-value]


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_does_not_reach_the_float32_inside(grad: bool) -> None:
    q, k, v = qkv()
    sinks = torch.randn(4)
    want, want_lse = attend(*(x.bfloat16().double() for x in (q, k, v)), sinks=sinks.double(), return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q.requires_grad_(grad), k, v, sinks=sinks, return_lse=True)
        mask = torch.randn(20, 20)
        masked = attend(q, k, v, mask=mask, backend="torch")
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) < 4e-3
    assert (lse - want_lse).abs().max() < 1e-5
    want = attend(*(x.detach().bfloat16().double() for x in (q, k, v)), mask=mask.double())
    assert relative_error(masked, want) < 4e-3


def test_torch_func_transforms_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^q: expected .* torch\.func"):
        torch.vmap(lambda x: attend(x, k, v))(torch.stack([q, q]))
    with pytest.raises(ValueError, match=r"^q: expected .* torch\.func"):
        torch.func.grad(lambda x: attend(x, k, v).sum())(q)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("q_len", [1, 20])
def test_keys_before_every_window_may_hold_anything(q_len: int, backend: str) -> None:
    q, k, v = qkv(q_len, 64)
    want = attend(*(x.double() for x in (q, k, v)), mask="causal", window=(5, 0))
    first = 64 - q_len - 5
    k[:, :, :first], v[:, :, :first] = torch.nan, torch.nan
    assert relative_error(attend(q, k, v, mask="causal", window=(5, 0), backend=backend), want) < 1e-5


@pytest.mark.parametrize("value", [torch.finfo(torch.float64).min, -1e300])
def test_finite_numbers_of_a_float64_mask_stay_finite(value: float) -> None:
    q, k, v = qkv()
    mask = torch.full((20, 20), value, dtype=torch.float64)
    want = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 20, 16)
    for backend in ("reference", "torch"):
        assert relative_error(attend(q, k, v, mask=mask, backend=backend), want) < 1e-5, backend


def test_the_log_sum_exp_that_nobody_wants_is_as_the_fake_says() -> None:
    q, k, v = qkv(5, 7)
    sinks = torch.zeros(4)
    torch.library.opcheck(
        torch.ops.fastattn.attention.default,
        (q, k, v, None, None, None, sinks, None, None, None, 0.25, -1, -1, 0.0, False, "", "reference"),
    )


def test_a_backend_that_refuses_when_it_is_called_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, fresh_caches: None, fresh_warnings: None
) -> None:
    q, k, v = qkv()
    calls = []

    def forward(call: Any) -> Any:
        calls.append(call)
        raise Refusal("no plan today")

    monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", lambda *args: SimpleNamespace(forward=forward))
    want = attend(*(x.double() for x in (q, k, v)))
    with pytest.warns(fastattn.FastattnWarning, match="torch refused a call that it should serve .no plan today"):
        out = attend(q, k, v)
    assert relative_error(out, want) < 1e-5
    attend(q, k, v)
    assert len(calls) == 1, "it is not asked again"
    assert fastattn.explain(q, k, v).reasons["torch"] == ["no plan today"]
    with pytest.raises(fastattn.BackendError, match="no plan today"):
        attend(q, k, v, backend="torch")


def test_a_default_device_is_not_that_of_the_scale() -> None:
    from fastattn.backends.cudnn.operands import scale_operand

    scale_operand.cache_clear()
    with torch.device("meta"):
        assert scale_operand(0.125).device.type == "cpu"
    assert float(scale_operand(0.125)) == 0.125


def test_no_backend_at_all_names_the_two_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKENDS", "cudnn")
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    with pytest.raises(fastattn.BackendError, match=r"FASTATTN_BACKENDS.*FASTATTN_CUDNN"):
        attend(*qkv())


def test_meta_tensors_pass_through_explain() -> None:
    q, k, v = (x.to("meta") for x in qkv())
    assert "reference" in fastattn.explain(q, k, v).reasons


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_traced_program_holds_the_operator(backend: str) -> None:
    """To `torch.jit.trace` sizes are tensors: no backend is to see them, nor a cache."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask="causal", window=(4, -1), backend=backend)

    def made(q_len: int, kv_len: int) -> list[Tensor]:
        return [torch.randn(2, heads, n, 8) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]

    first, other = made(5, 7), made(6, 9)
    function(*first)  # also of a kind that was served
    traced = torch.jit.trace(function, first)
    assert "fastattn::attention" in str(traced.graph)
    torch.testing.assert_close(traced(*other), function(*other))
    for x in (*first, *other):
        x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^fastattn: q, k, v: expected no gradient to be asked for"):
        traced(*other).sum().backward()
    # (torch's check traces once more, with inputs that need no gradient.)
    traced, grad_out = torch.jit.trace(function, first, check_trace=False), torch.randn(2, 4, 6, 8)
    gradients = [torch.autograd.grad(f(*other), other, grad_out) for f in (traced, function)]
    torch.testing.assert_close(*gradients)


class _Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask="causal")


def test_an_exported_program_does_not_lose_gradients_without_a_word() -> None:
    first, other = qkv(), qkv()
    for x in other:
        x.requires_grad_()
    inference = torch.export.export(_Attention(), first).module()
    torch.testing.assert_close(inference(*other), _Attention()(*other))
    with pytest.raises(RuntimeError, match=r"^fastattn: q, k, v: expected no gradient to be asked for"):
        inference(*other).sum().backward()
    trained = torch.export.export(_Attention(), other).module()
    gradients = [torch.autograd.grad(f(*other).square().sum(), other) for f in (trained, _Attention())]
    torch.testing.assert_close(*gradients)
