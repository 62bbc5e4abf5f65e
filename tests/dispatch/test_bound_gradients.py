"""Calls with gradients of a kind that was served before: the forward takes the fast path, the backward is not routed
again, unless something has changed between the two."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, make
from features import FEATURES
from served import Served
from threads import side_by_side
from torch import Tensor

import fastattn
from fastattn import debug
from fastattn.backends import torch as torch_sdpa
from fastattn.backends.base import OutOfMemory, Refusal, Setback
from fastattn.dispatch import eager, fast_path, routes, serve
from fastattn.dispatch import operators as ops

pytestmark = pytest.mark.usefixtures("way")

attend = fastattn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, fresh_caches: None, fresh_warnings: None) -> None:
    """No settings of the machine's, nothing cached by other tests."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(debug, "ENABLED", False)


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each forward and each backward that is routed."""
    taken: list[str] = []
    for module, name in ((ops, "attention"), (eager, "_backward")):
        function = getattr(module, name)

        def noted(*args: Any, function: Callable[..., Any] = function, name: str = name) -> Any:
            taken.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, noted)
    return taken


def qkv(dtype: torch.dtype = FP32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def step(inputs: list[Tensor], wanted: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
    """The output and the gradients."""
    out = attend(*inputs, **options)
    assert isinstance(out, Tensor)
    return [out, *torch.autograd.grad(out.square().sum(), wanted or inputs)]


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype


def fresh(call: Callable[[], Any]) -> Any:
    fastattn.clear_plans()
    found = call()
    fastattn.clear_plans()
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_again(name: str, long_ways: list[str], seed: int) -> None:
    """The same bits, of other data than those of the call that was cached."""
    for backend in ("torch", "reference"):
        case = FEATURES[name].but(dtype=FP32, return_lse=backend == "reference")
        case = case.but(grads="qkv" if backend == "torch" else case.leaves)
        first, second = make(case, seed=seed), make(case, seed=seed + 1)
        if fastattn.explain(first.q, first.k, first.v, **first.options, backend=backend).chosen is None:
            continue

        def both(inputs: Any, backend: str = backend) -> list[Tensor]:
            found = attend(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
            out = found if isinstance(found, Tensor) else found[0]
            return [out, *torch.autograd.grad(out, list(inputs.leaves.values()), inputs.grad_out)]

        want = fresh(lambda inputs=second: both(inputs))
        both(first)
        long_ways.clear()
        found = both(second)
        mask = second.options.get("mask")
        odd = (isinstance(mask, Tensor) and mask.dim() != 4) or (case.scale is not None and case.scale <= 0)
        assert long_ways == (["attention"] if odd else []), backend
        assert_same(found, want)


def test_what_wants_a_gradient_is_in_the_key(long_ways: list[str]) -> None:
    inputs = [*qkv(), torch.randn(4, requires_grad=True), torch.randn(1, 1, 5, 7, requires_grad=True)]
    for turn in range(2):
        for bits in range(32):
            for i, x in enumerate(inputs):
                x.requires_grad_(bool(bits >> i & 1))
            wanted = [x for x in inputs if x.requires_grad]
            q, k, v, sinks, mask = inputs
            out = attend(q, k, v, sinks=sinks, mask=mask)
            assert out.requires_grad == bool(wanted)
            if wanted:
                found = torch.autograd.grad(out.sum(), wanted)
                assert [x.shape for x in found] == [x.shape for x in wanted]
        assert len(fast_path._cached) == 32
        assert len(long_ways) == (0 if turn else 32)
        long_ways.clear()
    with torch.no_grad():
        assert not attend(q, k, v, sinks=sinks, mask=mask).requires_grad
    assert len(fast_path._cached) == 32, "as if none wanted a gradient"


# What has changed between forward and backward.


def _cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    fastattn.clear_plans()


def _refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some call was refused: any route may hold no longer."""
    other = torch.randn(1, 1, 1, 8)
    attend(other, other, other)
    (bound,) = [x for x in fast_path._cached.values() if x.route.problem.q_len == 1]
    with pytest.warns(fastattn.FastattnWarning, match="no more"):
        assert serve.refused(bound.route, Refusal("no more"))


@pytest.mark.parametrize("change", [_cleared, _refused])
def test_a_route_that_holds_no_longer_is_found_again(
    change: Any, long_ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = qkv()
    want = step(inputs)
    for _ in range(2):
        out = attend(*inputs)
    long_ways.clear()
    change(monkeypatch)
    long_ways.clear()
    assert_same([out, *torch.autograd.grad(out.square().sum(), inputs)], want)
    assert long_ways == ["_backward"]


def test_a_full_section_is_no_reason(long_ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of calls that are dropped for want of room still hold."""
    monkeypatch.setattr(routes._routes, "max_entries", 2)
    inputs = qkv()
    step(inputs)
    out = attend(*inputs)
    for length in range(1, 6):
        x = torch.randn(1, 1, length, 8)
        attend(x, x, x)
    long_ways.clear()
    torch.autograd.grad(out.sum(), inputs)
    step(inputs)
    assert long_ways == []


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A torch backend that serves until "forward" or "backward" is set to an exception, raised so many "times"."""
    state: dict[str, Any] = {"forward": None, "backward": None, "asked": [], "times": 100}
    bind = torch_sdpa.TorchBackend.bind

    def moody(self: Any, problem: Any, call: Any) -> Any:
        kernel = bind(self, problem, call)

        def method(name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                state["asked"].append(name)
                if state[name] is not None and state["times"]:
                    state["times"] -= 1
                    raise state[name]
                return getattr(kernel, name)(*arguments)

            return run

        return SimpleNamespace(forward=method("forward"), backward=method("backward"))

    monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", moody)
    return state


@pytest.mark.parametrize("error", [Refusal("not today"), Setback("not today"), OutOfMemory("not today")], ids=repr)
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_refusal_of_what_is_bound(pass_: str, error: Exception, moody: dict[str, Any]) -> None:
    """Another backend serves the call, as it would have the first one; the error is given once, as a warning."""
    inputs = qkv()
    want = step(inputs, backend="reference")
    for _ in range(2):
        step(inputs)
    moody |= {pass_: error, "asked": []}
    served = Served()
    with pytest.warns(fastattn.FastattnWarning, match="not today"):
        found = step(inputs)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)
    names = {"forward": "torch", "backward": "torch.backward"}
    names[pass_] = names[pass_].replace("torch", "reference")
    assert served() == dict.fromkeys(names.values(), 1)
    # After a lack of memory the one is asked a second time, when what torch holds unused was given back.
    assert moody["asked"].count(pass_) == (2 if isinstance(error, OutOfMemory) else 1)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_lack_of_memory_that_passes(pass_: str, moody: dict[str, Any]) -> None:
    inputs = qkv()
    want = [step(inputs) for _ in range(2)][1]
    moody |= {pass_: OutOfMemory("not now"), "times": 1}
    served = Served()
    assert_same(step(inputs), want)
    assert served() == {"torch": 1, "torch.backward": 1}


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_errors_of_the_callers_pass_through(pass_: str, moody: dict[str, Any]) -> None:
    inputs = qkv()
    for _ in range(2):
        step(inputs)
    moody[pass_] = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        step(inputs)
    moody[pass_] = None
    step(inputs)
    assert fastattn.explain(*inputs).chosen == "torch"


@pytest.mark.parametrize("to", ["contiguous", "strided", "bfloat16"])
def test_what_hooks_bring_back_in_another_layout(to: str, long_ways: list[str]) -> None:
    """A kernel that is bound to strides or a dtype must not be given others."""
    convert: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda x: x.contiguous(),
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "bfloat16": lambda x: x.bfloat16() if x.is_floating_point() and x.dim() == 4 else x,
    }
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv()]
    for options in ({}, {"kv_lengths": torch.tensor([7, 3, 0], dtype=torch.int32)[:2]}):
        want = step(inputs, **options)
        step(inputs, **options)
        long_ways.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), convert[to]):
            out = attend(*inputs, **options)
        found = torch.autograd.grad(out.square().sum(), inputs)
        assert long_ways == ["_backward"]
        tolerance = 0.05 if to == "bfloat16" else 1e-5
        torch.testing.assert_close(list(found), want[1:], rtol=tolerance, atol=tolerance)


HALVED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "all to bfloat16": (lambda x: x.to(BF16) if x.is_floating_point() else x, lambda x: x),
    "and back to float32": (
        lambda x: x.to(BF16) if x.is_floating_point() else x,
        lambda x: x.float() if x.is_floating_point() else x,
    ),
    "log-sum-exp alone": (lambda x: x, lambda x: x.to(FP16) if x.dim() == 3 else x),
}


@pytest.mark.parametrize("hooks", HALVED)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("operator", [False, True])
def test_what_hooks_bring_back_in_another_dtype(
    hooks: str, dtype: torch.dtype, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel gets addresses: it would read bfloat16 as the float32 that was saved, or beyond the end of it."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    inputs = qkv(dtype)
    given = [x.as_subclass(_Watched) for x in inputs] if operator else inputs
    for options in ({}, {"sinks": torch.ones(4), "kv_lengths": torch.tensor([7, 3], dtype=torch.int32)}):
        want = step(inputs, backend="reference", **options)[1:]
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(*HALVED[hooks]):
                out = attend(*given, backend="prefill", **options)
            found = torch.autograd.grad(out.square().sum(), inputs)
            assert [x.dtype for x in found] == 3 * [dtype]
            torch.testing.assert_close(list(found), want, rtol=0.05, atol=0.05)


class _Watched(Tensor):
    """Whose calls take the operator's way."""


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_again(dtype: torch.dtype, long_ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast is off inside the fast path and on again after it; inputs that need a cast are cast before it."""
    lower, full = qkv(dtype), qkv()
    mixed = [full[0], full[1], lower[2]]  # as rotary embeddings leave them
    for inputs in (lower, full, mixed):
        for options in ({"mask": "causal", "sinks": torch.ones(4)}, {"mask": "causal"}):
            plain = step(inputs, **options)
            with torch.autocast("cpu", dtype):
                want = fresh(lambda inputs=inputs, options=options: step(inputs, **options))
                step(inputs, **options)
                long_ways.clear()
                found = step(inputs, **options)
                assert torch.is_autocast_enabled("cpu")
                assert long_ways == []
            assert found[0].dtype == dtype
            assert_same(found, want)
            if inputs is lower:
                assert_same(found, plain)
    with torch.autocast("cpu", dtype):
        monkeypatch.setattr(serve, "count", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(lower, mask="causal")
        assert torch.is_autocast_enabled("cpu")


def test_autocast_in_the_backward_alone(long_ways: list[str]) -> None:
    inputs = qkv()
    want = [step(inputs, backend="reference") for _ in range(2)][1]
    out = attend(*inputs, backend="reference")
    loss = out.square().sum()
    long_ways.clear()
    with torch.autocast("cpu", BF16):
        assert_same([out, *torch.autograd.grad(loss, inputs)], want)
        assert torch.is_autocast_enabled("cpu")
    assert long_ways == []


def test_the_backends_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the forward, in both passes, whatever was cached and whatever holds in the backward."""
    inputs = qkv()
    for _ in range(2):
        for name in ("torch", "reference"):
            served = Served()
            with fastattn.use_backend(name):
                out = attend(*inputs)
            with fastattn.use_backend("reference" if name == "torch" else "torch"):
                torch.autograd.grad(out.sum(), inputs)
            assert served() == {name: 1, f"{name}.backward": 1}


def test_threads() -> None:
    """Each thread's gradients are its own, though what is bound is shared."""
    data = [qkv(seed=i) for i in range(4)]
    want = [step(inputs) for inputs in data]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(25):
            found = step(data[i])
            if not all(torch.equal(x, y) for x, y in zip(found, want[i], strict=True)):
                wrong.append(i)

    side_by_side(4, work)
    assert wrong == []


def test_batched_gradients_after_plain_ones() -> None:
    """is_grads_batched gives tensors that look like others, of which torch's dispatcher alone knows what they are."""
    inputs = qkv()
    upstream = torch.randn(3, 2, 4, 5, 8)
    want = [torch.autograd.grad(attend(*inputs), inputs, one) for one in upstream]
    found = torch.autograd.grad(attend(*inputs), inputs, upstream, is_grads_batched=True)
    for i, gradients in enumerate(want):
        torch.testing.assert_close(tuple(x[i] for x in found), gradients)
    assert_same(list(torch.autograd.grad(attend(*inputs), inputs, upstream[0])), list(want[0]))


def test_a_negative_upstream_gradient_after_plain_ones() -> None:
    inputs = qkv()
    upstream = torch.randn(2, 4, 5, 8)
    want = [torch.autograd.grad(attend(*inputs), inputs, -upstream) for _ in range(2)][1]
    found = torch.autograd.grad(attend(*inputs), inputs, torch._neg_view(upstream))
    torch.testing.assert_close(found, want)


def test_debugging_checks_calls_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv()
    for _ in range(2):
        step(inputs, kv_lengths=torch.tensor([8, 1], dtype=torch.int32))
    monkeypatch.setattr(debug, "ENABLED", True)
    with pytest.raises(ValueError, match=r"^kv_lengths: expected lengths in 0\.\.7"):
        step(inputs, kv_lengths=torch.tensor([8, 1], dtype=torch.int32))


def test_tensors_without_memory() -> None:
    """On the device "meta", of which torch has no autocast to ask for."""
    inputs = [x.detach().to("meta").requires_grad_() for x in qkv()]
    for _ in range(3):
        assert [x.is_meta for x in step(inputs)] == [True] * 4
        attend(*[x.detach() for x in inputs])
    assert not fast_path._cached
