"""The reference against attention written down naively: every feature, every gradient, and memory O(S)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, assert_right, check, make, reference_results, run
from features import FEATURES
from prepared import prepared
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import reference
from fastattn.call import Problem


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature(name: str, dtype: torch.dtype) -> None:
    case = FEATURES[name].but(dtype=dtype)
    check(case.but(grads=case.leaves, return_lse=True), "reference")


@pytest.mark.parametrize("name", FEATURES)
def test_outputs_without_gradients(name: str) -> None:
    check(FEATURES[name].but(dtype=FP32), "reference")


#: Not where there is nothing to differentiate, nor where a finite difference is lost in finfo.min.
DIFFERENTIABLE = [
    name for name, c in FEATURES.items() if 0 not in (c.batch, c.q_len, c.kv_len) and not c.mask.startswith("finfo")
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    """Finite differences: neither autograd's rules nor anyone's algebra."""
    case = FEATURES[name]
    small = case.but(batch=1, q_heads=2, kv_heads=1, q_len=min(case.q_len, 4), kv_len=min(case.kv_len, 3), head_dim=2)
    if case.mask.startswith(("segments:2", "segments:3")):  # queries and keys alike
        small = small.but(q_len=3)
    small = small.but(value_dim=case.value_dim and 3, dtype=FP64, grads=case.leaves, return_lse=True)
    small = small.but(q_lengths=case.q_lengths and (3,), kv_lengths=case.kv_lengths and (2,))
    small = small.but(mask_dtype=FP64, sinks=case.sinks and FP64, window=case.window and (1, 0))
    inputs = make(small)
    with torch.no_grad():  # finite differences of NaN are NaN, wherever the NaN is
        for x, clean in zip((inputs.q, inputs.k, inputs.v), inputs.clean):
            x.copy_(clean)
    leaves = inputs.leaves

    def attend(*values: torch.Tensor) -> Any:
        named = dict(zip(leaves, values))
        options = inputs.options | {"backend": "reference"}
        options |= {option: named[n] for n, option in (("m", "mask"), ("s", "sinks")) if n in named}
        out, lse = fastattn.scaled_dot_product_attention(named["q"], named["k"], named["v"], **options)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    values = [x.detach().clone().requires_grad_() for x in leaves.values()]
    assert torch.autograd.gradcheck(attend, values, check_undefined_grad=False)


@pytest.mark.parametrize("elements", [1, 100, 700])
@pytest.mark.parametrize(
    "name", ["causal", "everything", "bool-bhqk", "additive-11q1", "additive-1h1k", "lengths-sinks"]
)
def test_chunks(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and chunks that do not divide the rows: the same results."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), elements))
    case = FEATURES[name].but(dtype=FP64)
    check(case.but(grads=case.leaves, return_lse=True), "reference")


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had which an operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor):
                # An expanded tensor takes no memory: its storage counts, not its shape.
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize(
    "case",
    [Case(mask="causal", sinks=FP32), Case(window=(100, 3), softcap=9.0), Case(mask="intervals:bq", q_lengths=(4000,))],
    ids=str,
)
def test_memory_grows_with_the_length_not_its_square(case: Case) -> None:
    length = 4096
    case = case.but(batch=1, q_heads=2, kv_heads=1, q_len=length, kv_len=length, head_dim=8, dtype=FP32)
    inputs = make(case)
    options = {n: x for n, x in inputs.options.items() if n != "return_lse"}
    call = prepared(inputs.q, inputs.k, inputs.v, **options)._replace(grads="qkvs" if case.sinks else "qkv")
    problem = Problem.of(call)
    with _Largest() as largest:  # it does not look into an operator of ours, hence no call through the op
        out, lse = reference.forward(problem, call)
        reference.backward(problem, call, inputs.grad_out, None)
    assert 0 < largest.elements <= reference.CHUNK_ELEMENTS["cpu"] < length * length


def test_gradient_of_a_broadcast_mask_is_summed() -> None:
    case = Case(mask="additive:h11", dtype=FP64, grads="m")
    inputs = make(case)
    got, want = run(inputs, "reference")["dm"], reference_results(inputs)["dm"]
    assert got.shape == (case.q_heads, 1, 1)
    torch.testing.assert_close(got, want)


def test_only_the_log_sum_exp_differentiated() -> None:
    case = FEATURES["sinks-bool"].but(dtype=FP64, grads="qks", return_lse=True)
    inputs = make(case)
    inputs.grad_out.zero_()
    assert_right(case, inputs, run(inputs, "reference"))


def test_upstream_garbage_in_blind_rows_reaches_nothing() -> None:
    case = FEATURES["lengths-causal"].but(dtype=FP32, grads="qkv")
    inputs = make(case)
    want = reference_results(inputs)
    fully_masked = ~inputs.seen.any(-1)
    inputs.grad_out.masked_fill_(fully_masked[..., None], torch.nan)
    assert_right(case, inputs, run(inputs, "reference"), want)


def test_gradients_of_rows_under_nothing_but_finfo_min() -> None:
    """Uniform attention, although log(n) does not show in the log-sum-exp."""
    case = FEATURES["finfo"].but(dtype=FP64, grads="qkvm", return_lse=True)
    inputs = make(case)
    inputs.grad_out.copy_(torch.randn(inputs.grad_out.shape))
    inputs.grad_lse.copy_(torch.randn(inputs.grad_lse.shape))
    assert_right(case, inputs, run(inputs, "reference"))


@pytest.mark.parametrize("where", ["k", "v"])
def test_infinity_in_a_hidden_key(where: str) -> None:
    """0 * inf is NaN just as 0 * NaN is."""
    inputs = make(Case(dtype=FP32, kv_lengths=(4, 11), grads="qkv"))
    want = reference_results(inputs)
    with torch.no_grad():
        for x in (inputs.k, inputs.v):
            x.copy_(x.nan_to_num(0.0) if x is not getattr(inputs, where) else x.nan_to_num(torch.inf))
    assert_right(Case(dtype=FP32), inputs, run(inputs, "reference"), want)


def test_a_key_of_minus_infinity() -> None:
    """A visible key whose score is -inf has probability 0; the rest is as if it were not there."""
    q, k, v = torch.rand(1, 1, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    k[:, :, 2] = -torch.inf
    got = fastattn.scaled_dot_product_attention(q, k, v, backend="reference")
    rest = [0, 1, 3, 4]
    want = fastattn.scaled_dot_product_attention(q, k[:, :, rest], v[:, :, rest], backend="reference")
    torch.testing.assert_close(got, want)
