"""The op as torch sees it: schema, fakes, autograd, torch.compile, autocast, and the modes in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case, assert_right, make, run
from features import FEATURES
from prepared import prepared
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastattn

attend = fastattn.scaled_dot_product_attention
#: One call for each way into the op: every kind of mask, every optional tensor, every layout.
REPRESENTATIVE = [
    "causal", "bool-b1qk", "additive-1h1k", "intervals-bq", "segments-apart-causal", "sinks-window", "softcap",
    "lengths-causal", "value-dim-larger", "no-keys", "no-queries", "layout-sliced", "layout-dmajor", "layout-expanded",
    "everything",
]  # fmt: skip


def operator_arguments(case: Case, backend: str = "reference") -> tuple[Any, ...]:
    """What the op hands to torch.ops.fastattn.attention."""
    inputs = make(case)
    return (*prepared(inputs.q, inputs.k, inputs.v, **inputs.options), backend)


def backward_arguments(case: Case) -> tuple[Any, ...]:
    arguments = operator_arguments(case)
    with torch.no_grad():
        out, lse = torch.ops.fastattn.attention(*arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    return torch.randn_like(out), torch.randn_like(lse) if case.return_lse else None, out, lse, *detached


@pytest.mark.parametrize("grads", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_opcheck(name: str, grads: bool) -> None:
    case = FEATURES[name].but(dtype=FP32, return_lse=not grads)
    arguments = operator_arguments(case.but(grads=case.leaves) if grads else case)
    torch.library.opcheck(torch.ops.fastattn.attention.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_opcheck_of_half_precision(backend: str) -> None:
    arguments = operator_arguments(Case(dtype=BF16, mask="causal", grads="qkv"), backend)
    torch.library.opcheck(torch.ops.fastattn.attention.default, arguments)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_opcheck_of_the_backward(name: str) -> None:
    case = FEATURES[name].but(dtype=FP32, return_lse=True)
    arguments = backward_arguments(case.but(grads=case.leaves))
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, arguments, test_utils=utilities)


def _meta(x: Tensor) -> tuple[Any, ...]:
    strides = tuple(stride for stride, size in zip(x.stride(), x.shape) if size > 1) if x.numel() else ()
    return tuple(x.shape), strides, x.dtype, x.device.type, x.storage_offset()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_fakes_have_the_strides_of_real_results(name: str, dtype: torch.dtype) -> None:
    """A graph compiled for other strides than the real ones reads wrong memory."""
    case = FEATURES[name].but(dtype=dtype, return_lse=True)
    for backend in ("reference", "torch"):
        inputs = make(case.but(return_lse=backend == "reference"))
        arguments = (*prepared(inputs.q, inputs.k, inputs.v, **inputs.options), backend)
        if fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend).chosen is None:
            continue
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
            want = torch.ops.fastattn.attention(*fake)
        got = torch.ops.fastattn.attention(*arguments)
        assert [_meta(x) for x in got] == [_meta(x) for x in want]
    arguments = backward_arguments(case.but(grads=case.leaves))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        want = torch.ops.fastattn.attention_backward(*fake)
    got = torch.ops.fastattn.attention_backward(*arguments)
    assert [_meta(x) for x in got] == [_meta(x) for x in want]


def test_the_layout_is_token_major_for_every_backend() -> None:
    for layout in ("bhsd", "bshd", "dmajor"):
        inputs = make(Case(layout=layout, dtype=FP32, q_len=6, q_heads=4, head_dim=8))
        for backend in ("torch", "reference"):
            out = run(inputs, backend)["out"]
            assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_casts_as_torch_does(dtype: torch.dtype) -> None:
    """Under autocast rotary embeddings often leave q and k in float32 while v is already half."""
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        got = attend(q, k, v.to(dtype))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    got.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == FP32


def test_autocast_does_not_reach_the_float32_inside() -> None:
    case = Case(mask="causal", softcap=2.0, sinks=FP32, kv_len=9, dtype=BF16, grads="qkvs")
    inputs = make(case)
    want = run(inputs, "reference")
    with torch.autocast("cpu", BF16):
        got = run(inputs, "reference")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_autocast_leaves_float64_alone() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=FP64)
    with torch.autocast("cpu", BF16):
        assert attend(q, q, q).dtype == FP64


@pytest.mark.parametrize(
    "dtypes", [(FP32, BF16, BF16), (BF16, FP16, BF16), (FP16, FP16, FP32), (FP64, BF16, FP32)], ids=str
)
def test_mixed_dtypes_promote_as_torch_promotes(dtypes: tuple[torch.dtype, ...]) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8).to(d).requires_grad_() for d in dtypes)
    out = attend(q, k, v)
    assert out.dtype == (q + k + v).dtype
    torch.testing.assert_close(out, attend(*(x.to(out.dtype) for x in (q, k, v))))
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert tuple(x.dtype for x in found) == dtypes


def test_inference_mode() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    want = attend(q, k, v, mask="causal").detach()
    with torch.inference_mode():
        out = attend(q, k, v, mask="causal")
        assert out.is_inference()
    assert torch.equal(out, want)
    # Inference tensors may enter ordinary code, as long as nothing is to be differentiated.
    with torch.no_grad():
        attend(out, out, out)


def test_no_gradient_no_graph() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.no_grad():
        assert not attend(q, q, q).requires_grad
    assert not attend(q.detach(), q.detach(), q.detach()).requires_grad
    assert attend(q, q.detach(), q.detach()).requires_grad


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_double_backward(backend: str) -> None:
    """By autograd through the reference, whichever backend served."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(q, q, q, backend=backend).square().sum(), q, create_graph=True)
    grad.square().sum().backward()
    plain = q.detach().double().requires_grad_()
    out = torch.softmax(plain @ plain.mT / 8**0.5, -1) @ plain
    (grad,) = torch.autograd.grad(out.square().sum(), plain, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(q.grad.double(), plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced", "scalar"])
def test_upstream_gradients_of_any_layout(kind: str, backend: str) -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, backend=backend)
    upstream = {
        "expanded": torch.randn(1, 4, 1, 8).expand_as(out),
        "transposed": torch.randn(8, 6, 4, 2).permute(3, 2, 1, 0),
        "sliced": torch.randn(2, 4, 12, 9)[:, :, ::2, 1:],
        "scalar": torch.ones(()).expand_as(out),
    }[kind]
    got = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    want = torch.autograd.grad(out, (q, k, v), upstream.contiguous())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grads", ["q", "k", "v", "m", "s", "qk", "ks", "vm", "qkvms"])
def test_only_what_is_asked_for(grads: str) -> None:
    case = FEATURES["everything"].but(dtype=FP64, grads=grads)
    inputs = make(case)
    assert_right(case, inputs, run(inputs))
    others = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "m": inputs.options["mask"], "s": inputs.options["sinks"]}
    attend(inputs.q, inputs.k, inputs.v, **inputs.options).sum().backward()
    assert {name for name, x in others.items() if x.grad is not None} == set(grads)


def test_gradients_of_one_tensor_in_three_places() -> None:
    x = torch.randn(1, 2, 5, 8, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(x, x, x, mask="causal"), x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, mask="causal").square()

    want = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    checkpoint(block, q, k, v, use_reentrant=use_reentrant).sum().backward()
    for x, w in zip((q, k, v), want):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, w)


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    """Offloading to the CPU works through them."""
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x.clone(), lambda x: x):
        out = attend(q, k, v)
    assert len(saved) >= 4
    want = torch.autograd.grad(attend(q, k, v).sum(), q)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), want)


def test_changing_an_input_in_place_before_the_backward_is_noticed() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_module_that_uses_it_can_be_copied() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return attend(x, x, x, sinks=self.sinks)

    block, x = Block(), torch.randn(1, 2, 5, 8)
    block(x).sum().backward()
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x))


def test_no_uninitialised_memory_is_returned() -> None:
    """With torch's switch every empty tensor starts as NaN: whatever is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for name, case in FEATURES.items():
            inputs = make(case.but(dtype=FP32, grads=case.leaves, return_lse=True))
            for result, x in run(inputs, "reference", poison=False).items():
                assert not x.isnan().any(), (name, result)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
