"""The drop-in where somebody transforms or traces a call, or looks at it: torch.func, autocast, compile, export.

As by default on a CPU, where torch's function serves calls, and through the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from served import Served
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalVariant, causal_lower_right, causal_upper_left
from torch_calls import BF16, FP16, TORCHS, WAYS, TorchCall, default_backends, error, make, truth, way

import fastattn
from fastattn import drop_in

pytestmark = [
    pytest.mark.usefixtures("default_backends"),
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:The PyTorch API of nested tensors"),
]
__all__ = ["default_backends"]
SDPA = drop_in.scaled_dot_product_attention
vmap, grad = torch.func.vmap, torch.func.grad


@pytest.fixture(params=list(WAYS))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A way, taken by all calls of the test."""
    with fastattn.use_backend(*WAYS[request.param]) if WAYS[request.param] else nullcontext():
        yield request.param


def served_by_op(name: str) -> dict[str, int]:
    return {} if name == "torch" else {"reference": 1}


def close(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    assert error(found, want.double()) < 2e-5


def squared(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: function(q, k, v, **options).square().sum()


# torch.func


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize(
    "in_dims, shapes",
    [
        ((0, 0, 0), ((3, 2, 4, 6, 8), (3, 2, 4, 9, 8))),
        ((1, 0, 0), ((2, 3, 4, 6, 8), (3, 2, 4, 9, 8))),
        ((-1, 2, 2), ((2, 4, 6, 8, 3), (2, 4, 3, 9, 8))),
        ((0, None, None), ((3, 2, 4, 6, 8), (2, 4, 9, 8))),
        ((None, 0, 0), ((2, 4, 6, 8), (3, 2, 4, 9, 8))),
        ((0, 0, 0), ((3, 4, 6, 8), (3, 4, 9, 8))),
        ((0, None, None), ((3, 6, 8), (9, 8))),
    ],
)
def test_vmap(in_dims: Any, shapes: Any, options: Any, name: str) -> None:
    """As one more leading dim: one call."""
    q, k, v = (torch.randn(shapes[i > 0]) for i in range(3))
    want = vmap(lambda *x: TORCHS(*x, **options), in_dims)(q, k, v)
    served = Served()
    close(vmap(lambda *x: SDPA(*x, **options), in_dims)(q, k, v), want)
    assert served() == served_by_op(name)


@pytest.mark.parametrize("dims", [(None, 0), (0, 0), (0, None)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_vmap_of_masks(kind: str, dims: Any, name: str) -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    seen = torch.rand(5, 6, 9) < 0.7
    mask = seen if kind == "bool" else torch.randn(5, 6, 9).masked_fill(~seen, -torch.inf)
    q = q if dims[0] is None else torch.randn(5, 2, 4, 6, 8)
    mask = mask if dims[1] == 0 else mask[0]
    in_dims = (dims[0], None, None, dims[1])
    close(vmap(SDPA, in_dims)(q, k, v, mask), vmap(TORCHS, in_dims)(q, k, v, mask))


def test_vmap_twice(name: str) -> None:
    q, k, v = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 3, 4, 9, 8), torch.randn(2, 3, 4, 9, 8)
    served = Served()
    close(
        vmap(vmap(SDPA, (0, 0, None)), (0, None, 0))(q, k[0], v[:, 0]),
        vmap(vmap(TORCHS, (0, 0, None)), (0, None, 0))(q, k[0], v[:, 0]),
    )
    assert served() == served_by_op(name)


def test_vmap_with_grouped_heads(name: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 2, 9, 8), torch.randn(3, 2, 2, 9, 8)
    close(*(vmap(partial(f, enable_gqa=True))(q, k, v) for f in (SDPA, TORCHS)))


def test_gradients_through_vmap(name: str) -> None:
    """By autograd: those of the op."""
    found = []
    for function in (SDPA, TORCHS):
        q, k, v = (
            torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "qkv"
        )
        vmap(function)(q, k, v).square().sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for mine, want in zip(*found, strict=True):
        close(mine, want)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_transforms_that_torchs_kernels_have(options: Any, name: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 4, 9, 8), torch.randn(3, 2, 4, 9, 8)
    mine, torchs = squared(SDPA, **options), squared(TORCHS, **options)
    close(grad(mine)(q[0], k[0], v[0]), grad(torchs)(q[0], k[0], v[0]))
    close(vmap(grad(mine))(q, k, v), vmap(grad(torchs))(q, k, v))
    close(grad(lambda q: vmap(mine)(q, k, v).sum())(q), grad(lambda q: vmap(torchs)(q, k, v).sum())(q))
    small = q[0, :1, :1], k[0, :1, :1], v[0, :1, :1]
    close(
        torch.func.jacrev(lambda q: SDPA(q, *small[1:]))(small[0]),
        torch.func.jacrev(lambda q: TORCHS(q, *small[1:]))(small[0]),
    )


def test_forward_mode_and_second_derivatives(name: str) -> None:
    """On torch's math kernel, which has them."""
    q, k, v = (torch.randn(1, 2, 4, 4, dtype=torch.double) for _ in "qkv")
    with sdpa_kernel(SDPBackend.MATH):
        close(*(torch.func.jvp(f, (q, k, v), (k, v, q))[1] for f in (SDPA, TORCHS)))
        close(*(torch.func.hessian(squared(f))(q, k, v) for f in (SDPA, TORCHS)))
        tangents = []
        for function in (SDPA, TORCHS):
            with forward_ad.dual_level():
                tangents.append(forward_ad.unpack_dual(function(forward_ad.make_dual(q, k), k, v)).tangent)
        close(*tangents)
        assert torch.autograd.gradgradcheck(SDPA, tuple(x.clone().requires_grad_() for x in (q, k, v)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_second_derivatives_of_the_op(options: Any) -> None:
    q, k = (torch.randn(3, 2, n, 3, dtype=torch.double, requires_grad=True) for n in (3, 4))
    with fastattn.use_backend("reference"):
        assert drop_in.explain(q, k, k, **options).chosen == "reference"
        assert torch.autograd.gradgradcheck(partial(SDPA, **options), (q, k, k))


def test_dual_numbers_reach_torchs_kernels(name: str) -> None:
    q = torch.randn(1, 2, 4, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward AD"):  # as of torch's kernel for CPUs
            SDPA(dual, q, q)


# autocast


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast(dtype: torch.dtype, mask: str | None, name: str) -> None:
    inputs = make(TorchCall(mask=None if mask is None else f"{mask}:6,9"))
    with torch.autocast("cpu", dtype=dtype):
        served = Served()
        found, want = inputs.call(SDPA), inputs.call(TORCHS)
        assert served() == served_by_op(name)
    assert found.dtype == want.dtype == dtype
    assert error(found, truth(inputs)) < 2e-2


def test_autocast_rounds_a_mask_as_torchs(name: str) -> None:
    """float32's most negative number is -inf in bfloat16: a row of it sees nothing."""
    inputs = make(TorchCall())
    inputs.mask = torch.zeros(6, 9)
    inputs.mask[1] = torch.finfo(torch.float32).min
    with torch.autocast("cpu", dtype=BF16):
        found, want = inputs.call(SDPA), inputs.call(TORCHS)
    assert not found[:, :, 1].any() and not want[:, :, 1].any()
    assert error(found, want.double()) < 1e-2


def test_autocast_of_mixed_dtypes_and_gradients(name: str) -> None:
    grads = []
    for function in (SDPA, TORCHS):
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8).half(), torch.randn(2, 4, 9, 8).bfloat16()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=BF16):
            out = function(*leaves)
        out.float().square().sum().backward()
        assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
        grads.append([x.grad for x in leaves])
    for mine, want in zip(*grads, strict=True):
        assert error(mine, want.double()) < 3e-2


@pytest.mark.parametrize("what", ["q", "mask"])
def test_autocast_leaves_float64_alone(what: str, name: str) -> None:
    inputs = make(TorchCall(mask="float:6,9"))
    if what == "q":
        inputs = inputs.fresh(torch.float64)
    else:
        inputs.mask = inputs.mask.double()
    with torch.autocast("cpu", dtype=BF16):
        if what == "q":
            assert inputs.call(SDPA).dtype == torch.float64
        else:
            with pytest.raises(RuntimeError, match="attn_mask dtype"):
                inputs.call(SDPA)


# Tracing


class Block(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return SDPA(q * 1.0, k, v, mask, **self.options) + 0.0


COMPILED = {
    "plain": TorchCall(),
    "causal": TorchCall(is_causal=True),
    "more queries, causal": TorchCall(q=(2, 4, 11, 8), is_causal=True),
    "bool": TorchCall(mask="bool:2,1,6,9"),
    "float": TorchCall(mask="float:6,9"),
    "three dims": TorchCall(q=(4, 6, 8), k=(4, 9, 8), mask="bool:6,9"),
    "five dims": TorchCall(q=(2, 3, 2, 6, 8), k=(1, 3, 2, 9, 8), is_causal=True),
    "grouped heads": TorchCall(k=(2, 2, 9, 8), enable_gqa=True, scale=0.1),
}


@pytest.mark.parametrize(
    "case, dynamic",
    [*((case, None) for case in COMPILED), ("causal", True), ("causal", False), ("five dims", False)],
)
def test_compile(case: str, dynamic: bool | None, name: str) -> None:
    torch._dynamo.reset()
    call = COMPILED[case]
    inputs = make(call)
    block = torch.compile(Block(**inputs.options), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    own, torchs = inputs.fresh(), inputs.fresh()
    served = Served()
    found = block(own.q, own.k, own.v, own.mask)
    assert served() == served_by_op(name)
    want = torchs.call(TORCHS)
    close(found, want)
    found.square().sum().backward()
    want.square().sum().backward()
    for x, y in zip(own.leaves(), torchs.leaves(), strict=True):
        close(x.grad, y.grad)
    if not call.mask:
        longer = make(call.but(q=(*call.q[:-2], call.q[-2] + 1, call.q[-1])))
        with torch.no_grad():
            close(block(longer.q, longer.k, longer.v), longer.call(TORCHS))


def test_compile_under_autocast(name: str) -> None:
    torch._dynamo.reset()
    inputs = make(TorchCall(mask="float:6,9"))
    compiled = torch.compile(SDPA, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=BF16):
        found, want = inputs.call(compiled), inputs.call(TORCHS)
    assert found.dtype == BF16
    assert error(found, want.double()) < 1e-2


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_compile_of_transforms(transform: str, name: str) -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 4, 9, 8), torch.randn(3, 2, 4, 9, 8)
    mine, torchs = (vmap(f) if transform == "vmap" else grad(squared(f)) for f in (SDPA, TORCHS))
    close(torch.compile(mine, fullgraph=True, backend="aot_eager")(q, k, v), torchs(q, k, v))


def test_compile_of_dropout(name: str) -> None:
    torch._dynamo.reset()
    q = torch.randn(2, 4, 6, 8)
    found = torch.compile(lambda q: SDPA(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")(q)
    assert found.shape == q.shape and not torch.allclose(found, TORCHS(q, q, q))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool, strict: bool, name: str, tmp_path: Any) -> None:
    """By default with torch's operator: the program runs where fastattn is not installed."""
    inputs = make(TorchCall(is_causal=True))
    shapes = ({2: torch.export.Dim.AUTO}, {2: torch.export.Dim.AUTO}, {2: torch.export.Dim.AUTO}) if dynamic else None
    arguments = (inputs.q, inputs.k, inputs.v)
    if dynamic:
        shapes = {"q": shapes[0], "k": shapes[1], "v": shapes[2]}
    program = torch.export.export(Block(is_causal=True), arguments, strict=strict, dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    if name == "torch":
        assert "aten.scaled_dot_product_attention.default" in targets
        assert not any("fastattn" in target for target in targets)
    torch.export.save(program, tmp_path / "program.pt2")
    close(torch.export.load(tmp_path / "program.pt2").module()(*arguments), inputs.call(TORCHS))


def test_jit_trace_and_fx(name: str) -> None:
    inputs = make(TorchCall())
    arguments = (inputs.q, inputs.k, inputs.v)
    traced = torch.jit.trace(lambda q, k, v: SDPA(q, k, v), arguments)
    assert "scaled_dot_product_attention" in str(traced.graph)
    close(traced(*arguments), inputs.call(TORCHS))
    graph = torch.fx.symbolic_trace(Block())
    assert TORCHS in {node.target for node in graph.graph.nodes}
    close(graph(*arguments), inputs.call(TORCHS))


# Tensors without values, of other classes, under modes


def test_meta(name: str) -> None:
    q, k = torch.empty(2, 4, 6, 8, device="meta"), torch.empty(2, 4, 9, 8, device="meta")
    found = SDPA(q, k, k, is_causal=True)
    assert found.shape == q.shape and found.device.type == "meta"
    assert "neither" in drop_in.explain(q, k, k).reason


def test_fake_tensors(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 4, 6, 8)
        assert SDPA(q, q, q).shape == q.shape


class Logged(Tensor):
    """A subclass that sees torch's functions."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_torchs_function(name: str) -> None:
    q = torch.randn(2, 4, 6, 8)
    Logged.seen.clear()
    found = SDPA(q.as_subclass(Logged), q, q)
    assert type(found) is Logged
    assert Logged.seen == [TORCHS]
    close(found.as_subclass(Tensor), TORCHS(q, q, q))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: torch.layout, name: str) -> None:
    parts = [torch.randn(n, 4, 8) for n in (3, 5)]
    if layout == torch.jagged:
        x = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    else:
        x = torch.nested.nested_tensor([part.transpose(0, 1).contiguous() for part in parts], layout=layout)
    found = SDPA(x, x, x)
    assert found.is_nested
    for one, part in zip(found.unbind(), parts, strict=True):
        part = part.transpose(0, 1)[None]
        close(one[None], TORCHS(part, part, part))


@pytest.mark.parametrize("bias", [causal_lower_right(6, 9), causal_upper_left(6, 9)], ids=["lower", "upper"])
def test_torchs_causal_biases(bias: Any, name: str) -> None:
    inputs = make(TorchCall())
    offset = 3 if bias.variant == CausalVariant.LOWER_RIGHT else 0
    want = TORCHS(inputs.q, inputs.k, inputs.v, torch.ones(6, 9, dtype=torch.bool).tril(offset))
    close(SDPA(inputs.q, inputs.k, inputs.v, bias), want)
    with drop_in.patched():
        close(torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, bias), want)


def test_modes_see_torchs_function(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(2, 4, 6, 8)
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        SDPA(q, q, q)
    assert seen == [TORCHS]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        SDPA(q, q, q)
    assert counter.get_total_flops() > 0


def test_the_mode_of_a_default_device_is_no_reason(name: str) -> None:
    q = torch.randn(2, 4, 6, 8)
    with torch.device("cpu"), way(name):
        SDPA(q, q, q)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, name: str) -> None:
    found = []
    for function in (SDPA, TORCHS):
        q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.utils.checkpoint.checkpoint(function, q, q, q, use_reentrant=reentrant).square().sum().backward()
        found.append(q.grad)
    close(*found)


def test_inference_mode(name: str) -> None:
    with torch.inference_mode(), way(name):
        q = torch.randn(2, 4, 6, 8)
        SDPA(q, q, q)


def test_dropout_is_torchs(name: str) -> None:
    q = torch.randn(2, 4, 64, 8)
    torch.manual_seed(0)
    with way("torch"):
        found = SDPA(q, q, q, None, 0.5)
    torch.manual_seed(0)
    assert torch.equal(found, TORCHS(q, q, q, None, 0.5))
    assert "dropout" in str(drop_in.explain(q, q, q, dropout_p=0.5))
