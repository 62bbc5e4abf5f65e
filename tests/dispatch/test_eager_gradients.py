"""Gradients where nothing traces the call: an autograd.Function stands where the operator does otherwise.

The operator is the measure: the same call given to `torch.ops.fastattn.attention`, gradients and all.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import naive
import native_emulation
import pytest
import torch
from cases import BF16, FP32, Case, Inputs, Watcher, make
from features import FEATURES
from prepared import prepared
from served import Served
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import reference
from fastattn.dispatch import fast_path, registry
from fastattn.dispatch import operators as ops
from fastattn.dispatch.native import calls as native
from fastattn.validation import Arguments, validated

attend = fastattn.scaled_dot_product_attention
EAGER, OPERATOR = "_AttentionBackward", "GeneratedBackwardFor_fastattn_attention_defaultBackward"
NATIVE = "CppFunction"  #: `FastattnBackward`, as Python sees it


@pytest.fixture(autouse=True, params=["first", "again", "native"])
def turn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> Iterator[str]:
    """No settings of the machine's. "first": every call takes the full path; "again": even the first one of a kind goes
    the way of those that come after it; "native": without Python, as far as that goes."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    served = fast_path.attention

    def again(key: Any, arguments: Any, scale: float | None, *, place: Any = None) -> Any:
        if key not in fast_path._cached:
            call = validated(Arguments(*arguments), scale)
            fast_path.remember(key, arguments, call, registry.names_for(key[-2]))
        bound = fast_path._cached.get(key)
        if place is not None and bound is not None and bound.offers:
            call = validated(Arguments(*arguments), scale)
            native.offer(bound, call, arguments, scale, place)
            found = native.module.attention(arguments, scale, *place)
            if found is not None:
                return found, None
        return served(key, arguments, scale)

    emulation = native_emulation.take(monkeypatch) if request.param == "native" else None
    monkeypatch.setattr(fast_path, "attention", (lambda *_, **__: None) if request.param == "first" else again)
    yield str(request.param)
    assert emulation is None or not emulation.errors


def operator(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "reference", **options: Any) -> Any:
    """`attend`, but by way of the operator."""
    out, lse = torch.ops.fastattn.attention(*prepared(q, k, v, **options), backend)
    return (out, lse) if options.get("return_lse") else out


def node(x: Tensor) -> str:
    return type(x.grad_fn).__name__


def qkv(dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, h, n, 8, dtype=dtype, requires_grad=True) for h, n in ((4, 5), (2, 7), (2, 7)))  # type: ignore[return-value]


def results(inputs: Inputs, function: Callable[..., Any], backend: str, with_lse: bool) -> list[Any]:
    """Outputs, whether they are differentiable, and the gradients; with_lse: also through the log-sum-exp."""
    found = function(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    out, lse = found if isinstance(found, tuple) else (found, None)
    assert node(out) in ((EAGER, NATIVE) if function is attend else (OPERATOR,))
    outputs, upstream = [out], [inputs.grad_out]
    if lse is not None and with_lse:
        outputs, upstream = [out, lse], [inputs.grad_out, inputs.grad_lse.to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, list(inputs.leaves.values()), upstream)
    return [out, lse, lse is not None and lse.requires_grad, *gradients]


def same(got: Any, want: Any) -> bool:
    if isinstance(want, Tensor):
        return torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()
    return got == want


@pytest.mark.parametrize("name", FEATURES)
def test_the_operators_results_bit_for_bit(name: str) -> None:
    """Also with the log-sum-exp, with a gradient for it and without."""
    for backend, dtype, lse in itertools.product(("reference", "torch"), (FP32, BF16), ("", "given", "differentiated")):
        case = FEATURES[name].but(dtype=dtype, return_lse=bool(lse))
        case = case.but(grads="qkv" if backend == "torch" else case.leaves)
        inputs = make(case)
        if fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend).chosen is None:
            continue
        got, want = (results(inputs, f, backend, lse == "differentiated") for f in (attend, operator))
        assert len(got) == len(want) == 3 + len(case.grads)
        for i, (x, y) in enumerate(zip(got, want)):
            assert same(x, y), (backend, dtype, lse, i)


EVERYTHING = FEATURES["everything"].but(dtype=FP32, return_lse=True)


@pytest.mark.parametrize(
    "grads", ["".join(some) for n in range(1, 6) for some in itertools.combinations("qkvms", n)]
)  # fmt: skip
def test_every_subset_of_inputs(grads: str) -> None:
    """Each alone and with others: what is asked for is there and right, and nothing else."""
    whole = make(EVERYTHING.but(grads="qkvms"))
    out, lse = operator(whole.q, whole.k, whole.v, **whole.options)
    gradients = torch.autograd.grad((out, lse), list(whole.leaves.values()), (whole.grad_out, whole.grad_lse))
    want = dict(zip("qkvms", gradients))
    inputs = make(EVERYTHING.but(grads=grads))
    out, lse = attend(inputs.q, inputs.k, inputs.v, **inputs.options, backend="reference")
    torch.autograd.backward((out, lse), (inputs.grad_out, inputs.grad_lse))
    tensors = dict(zip("qkvms", (inputs.q, inputs.k, inputs.v, inputs.options["mask"], inputs.options["sinks"])))
    assert "".join(n for n, x in tensors.items() if x.grad is not None) == grads
    for name in grads:
        torch.testing.assert_close(tensors[name].grad, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("grads", ["q", "v", "qkvms", "ms"])
def test_only_the_log_sum_exp_is_used(grads: str) -> None:
    """The output's upstream gradient is None then, not zeros."""
    inputs = make(EVERYTHING.but(grads=grads))
    found = []
    for function in (attend, operator):
        _, lse = function(inputs.q, inputs.k, inputs.v, **inputs.options, backend="reference")
        found.append(torch.autograd.grad(lse, list(inputs.leaves.values()), inputs.grad_lse, allow_unused=True))
    for got, want in zip(*found):
        assert same(got, want)
    assert "v" not in grads or not dict(zip(grads, found[0]))["v"].any(), "it does not depend on v"


def test_a_log_sum_exp_that_was_not_asked_for_is_not_there() -> None:
    q, k, v = qkv()
    call = prepared(q, k, v)
    out, lse = ops.attention(call, ("reference",))
    assert node(out) == EAGER and lse is None
    (out, lse) = attend(q, k, v, return_lse=True)
    assert node(lse) == EAGER


@pytest.mark.parametrize("function", [attend, operator])
def test_an_upstream_gradient_that_is_not_there_is_none(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of the log-sum-exp, were it but zeros, would cost cuDNN's backward: it takes none."""
    given: list[Any] = []
    backward = reference.backward
    monkeypatch.setattr(reference, "backward", lambda *args: given.append(args[-2:]) or backward(*args))
    q, k, v = qkv()
    out, lse = function(q, k, v, return_lse=True, backend="reference")
    torch.autograd.grad(out.sum(), q, retain_graph=True)
    torch.autograd.grad(lse.sum(), q)
    assert given[0][1] is None and given[0][0] is not None
    assert given[-1][1] is not None and not given[-1][0].any()


def test_an_unused_output_costs_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    q, k, v = qkv()
    out, _ = attend(q, k, v, return_lse=True)
    (found,) = torch.autograd.grad(q.sum() + 0 * out.detach().sum(), q)
    assert torch.equal(found, torch.ones_like(q))
    assert served() == {"reference": 1}


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("function", [attend, operator])
def test_create_graph_and_double_backward(function: Callable[..., Any], use_lse: bool) -> None:
    """The first gradients are right though a graph is made for them; the second too, but for the log-sum-exp."""
    q, k, v = qkv()
    want = torch.autograd.grad(function(q, k, v, backend="reference").square().sum(), (q, k, v))
    found = function(q, k, v, return_lse=True, backend="reference")
    loss = found[0].square().sum() + (found[1].sum() if use_lse else 0)
    got = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    assert all(x.requires_grad for x in got)
    if not use_lse:
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    penalty = sum(x.square().sum() for x in got)
    if use_lse:
        with pytest.raises(RuntimeError, match=r"^fastattn: double backward is not supported for the log-sum-exp"):
            penalty.backward()
        return
    penalty.backward()
    plain = [x.detach().double().requires_grad_() for x in (q, k, v)]
    first = torch.autograd.grad(naive.attention(*plain).out.square().sum(), plain, create_graph=True)
    sum(x.square().sum() for x in first).backward()
    for mine, right in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_create_graph_where_only_another_way_is_differentiated_twice() -> None:
    """A gradient penalty on a layer beside attention does not touch attention's second derivative."""
    q, k, v = qkv()
    weight = torch.randn(8, requires_grad=True)
    (first,) = torch.autograd.grad((attend(q, k, v).detach() * weight.square()).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.isfinite(second).all() and second.abs().sum() > 0


@pytest.mark.parametrize("kind", ["clone", "contiguous", "save_on_cpu", "numpy"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_saved_tensors_hooks(kind: str, backend: str) -> None:
    """What is saved goes through the hooks, and may come back in another layout."""
    case = FEATURES["layout-sliced"].but(dtype=FP32, grads="qkv")
    inputs = make(case)
    leaves = list(inputs.leaves.values())
    out = attend(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    want = torch.autograd.grad(out, leaves, inputs.grad_out)
    packed: list[int] = []

    def pack(x: Tensor) -> Any:
        packed.append(x.data_ptr())
        made = {"clone": Tensor.clone, "contiguous": Tensor.contiguous, "numpy": lambda x: x.detach().numpy().copy()}
        return made[kind](x)

    def unpack(x: Any) -> Tensor:
        return torch.from_numpy(x) if kind == "numpy" else x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with torch.autograd.graph.save_on_cpu() if kind == "save_on_cpu" else hooks:
        out = attend(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    if kind != "save_on_cpu":
        assert {x.data_ptr() for x in (inputs.q, inputs.k, inputs.v)} <= set(packed)
    got = torch.autograd.grad(out, leaves, inputs.grad_out)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"sinks": torch.ones(4)}], ids=str)
def test_checkpoint(options: dict[str, Any], use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    scale = torch.ones(8, requires_grad=True)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = attend(q * scale, k, v, mask="causal", backend="reference", **options)
        out, lse = found if isinstance(found, tuple) else (found, found.new_zeros(1))
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0).sum()

    want = torch.autograd.grad(block(q, k, v), (q, k, v, scale))
    served = Served()
    checkpoint(block, q, k, v, use_reentrant=use_reentrant).backward()
    assert served() == {"reference": 2, "reference.backward": 1}
    for x, w in zip((q, k, v, scale), want):
        torch.testing.assert_close(x.grad, w, rtol=0, atol=0)


def test_backward_twice_with_a_retained_graph() -> None:
    q, k, v = qkv()
    out = attend(q, k, v)
    out.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in (q, k, v)]
    out.sum().backward()
    for x, w in zip((q, k, v), first):
        torch.testing.assert_close(x.grad, 2 * w)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("which", ["q", "k", "v", "mask", "sinks", "q_lengths", "kv_lengths", "out"])
def test_a_change_in_place_before_the_backward_is_noticed(which: str) -> None:
    inputs = make(EVERYTHING.but(grads="qkvms", return_lse=False))
    out = attend(inputs.q, inputs.k, inputs.v, **inputs.options)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out} | inputs.options
    with torch.no_grad():
        tensors[which].add_(1)
    text = (
        "modified by an inplace operation"
        if which != "out"
        else "Output 0 of _Attention .* modified inplace|output 0 of Fastattn, is at version 1"
    )
    with pytest.raises(RuntimeError, match=text):
        out.sum().backward()


def test_a_change_of_an_interval_before_the_backward_is_noticed() -> None:
    inputs = make(FEATURES["intervals-bq"].but(dtype=FP32, grads="q"))
    out = attend(inputs.q, inputs.k, inputs.v, **inputs.options)
    inputs.options["mask"].hi.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("during", ["forward", "both", "backward"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast(during: str, backend: str) -> None:
    """The casts are outside; inside, float32 stays float32, in the backward too."""
    q, k, v = qkv()
    found = []
    for function in (attend, operator):
        with torch.autocast("cpu", BF16, enabled=during != "backward"):
            out = function(q, k, v, mask="causal", backend=backend)
        assert out.dtype == (FP32 if during == "backward" else BF16)
        loss = out.float().square().sum()
        with torch.autocast("cpu", BF16, enabled=during != "forward"):
            gradients = torch.autograd.grad(loss, (q, k, v))
        assert {x.dtype for x in gradients} == {FP32}
        found.append((out, *gradients))
    for got, want in zip(*found):
        assert same(got, want)
    if during == "backward":
        plain = torch.autograd.grad(attend(q, k, v, mask="causal", backend=backend).square().sum(), (q, k, v))
        torch.testing.assert_close(found[0][1:], plain, rtol=0, atol=0)


def test_hooks() -> None:
    """On inputs, on the output, and on the node: each is called once, and may change the gradient."""
    q, k, v = qkv()
    (want,) = torch.autograd.grad(attend(q, k, v).sum(), q)
    called: list[str] = []
    q.register_hook(lambda g: called.append("q") or g * 2)
    q.register_post_accumulate_grad_hook(lambda x: called.append("accumulated"))
    out = attend(q, k, v)
    assert out.grad_fn is not None
    out.grad_fn.register_prehook(lambda grads: called.append("before"))
    out.grad_fn.register_hook(lambda inputs, outputs: called.append("after"))
    out.register_hook(lambda g: called.append("out") or g * 3)
    out.retain_grad()
    out.sum().backward()
    assert sorted(called) == sorted(["out", "before", "after", "q", "accumulated"])
    torch.testing.assert_close(q.grad, 6 * want)
    torch.testing.assert_close(out.grad, torch.full_like(out, 3.0))


def test_gradients_of_parameters_and_of_what_is_no_leaf() -> None:
    weight = Parameter(torch.randn(8, 8))
    x = torch.randn(2, 4, 5, 8)
    out = attend(x @ weight, x @ weight, x)
    assert node(out) in (EAGER, NATIVE)
    (got,) = torch.autograd.grad(out.sum(), weight)
    (want,) = torch.autograd.grad(operator(x @ weight, x @ weight, x, backend="torch").sum(), weight)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    parameters = [Parameter(y.detach()) for y in qkv()]
    assert node(attend(*parameters)) in (EAGER, NATIVE)


@pytest.mark.parametrize("dtypes", [(FP32, BF16, BF16), (BF16, FP32, torch.float64)], ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = [x.detach().to(d).requires_grad_() for x, d in zip(qkv(), dtypes)]
    got = torch.autograd.grad(attend(*inputs, backend="reference").square().sum(), inputs)
    want = torch.autograd.grad(operator(*inputs).square().sum(), inputs)
    assert tuple(x.dtype for x in got) == dtypes
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.4, 3])
def test_scales_that_are_folded_into_the_queries(scale: float) -> None:
    q, k, v = qkv()
    got = torch.autograd.grad(attend(q, k, v, scale=scale, backend="reference").square().sum(), (q, k, v))
    want = torch.autograd.grad(operator(q, k, v, scale=scale).square().sum(), (q, k, v))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_batched_upstream_gradients() -> None:
    """is_grads_batched runs the backward under vmap."""
    q, k, v = qkv()
    upstream = torch.randn(3, 2, 4, 5, 8)
    found = []
    for function in (attend, operator):
        out = function(q, k, v, backend="reference")
        found.append(torch.autograd.grad(out, (q, k, v), upstream, is_grads_batched=True))
    torch.testing.assert_close(*found)
    out = attend(q, k, v, backend="reference")
    one = torch.autograd.grad(out, q, upstream[1])[0]
    torch.testing.assert_close(found[0][0][1], one)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sinks"])
def test_forward_mode_is_refused(name: str, trained: bool, backend: str) -> None:
    """No kernel carries tangents: they would be lost without a word, also in a call of a kind that was served."""
    q, k, v = (x.detach().requires_grad_(trained) for x in qkv())
    arguments = {"q": q, "k": k, "v": v, "mask": torch.zeros(q.shape[2], k.shape[2])}
    if backend == "reference":
        arguments["sinks"] = torch.zeros(q.shape[1])
    elif name == "sinks":
        return
    want = attend(**arguments, backend=backend)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(attend(**arguments, backend=backend), want)  # nothing has a tangent
        x = arguments[name]
        arguments[name] = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match=f"^{name}: expected no tangent of torch.autograd.forward_ad"):
            attend(**arguments, backend=backend)
    torch.testing.assert_close(attend(**(arguments | {name: x}), backend=backend), want)


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled", "ignore:Error detected in (_Attention|Fastattn)"
)
def test_anomaly_detection_names_the_function() -> None:
    q, k, v = qkv()
    with torch.autograd.detect_anomaly():
        out = attend(q, k, v, backend="reference")
        with pytest.raises(RuntimeError, match=r"(_Attention|Fastattn)Backward' returned nan values"):
            out.backward(torch.full_like(out, torch.nan))


def test_who_watches_sees_operators() -> None:
    """In the forward, and in the backward of a call whose forward nobody watched."""
    q, k, v = qkv()
    want = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    with Watcher() as watcher:
        out = attend(q, k, v)
    assert "fastattn.attention.default" in watcher.seen and node(out) == OPERATOR
    out = attend(q, k, v)
    assert node(out) in (EAGER, NATIVE)
    with Watcher() as watcher:
        got = torch.autograd.grad(out.sum(), (q, k, v))
    assert "fastattn.attention_backward.default" in watcher.seen
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    out = attend(q, k, v)
    with Watcher() as watcher:
        pass
    torch.autograd.grad(out.sum(), (q, k, v))
    assert watcher.seen == []


def test_nothing_goes_by_the_operator_unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Function is for: torch's way to an operator in Python costs as much as a small kernel."""
    monkeypatch.setattr(torch.ops, "fastattn", None)
    q, k, v = qkv()
    torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_compiled_code_holds_the_operators(graphs: list[torch.fx.GraphModule]) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = attend(q, k, v, mask="causal", sinks=sinks, return_lse=True)
        return out.square().sum() + lse.sum()

    q, k, v = qkv()
    sinks = torch.randn(4, requires_grad=True)
    leaves = q, k, v, sinks
    want = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, want)
    called = [str(n.target) for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    assert called.count("fastattn.attention.default") == called.count("fastattn.attention_backward.default") == 1
    for x, y in zip(torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves), leaves), want):
        torch.testing.assert_close(x, y)


def test_a_graph_made_eagerly_can_be_differentiated_by_compiled_autograd(graphs: Any) -> None:
    q, k, v = qkv()
    want = torch.autograd.grad(attend(q, k, v, mask="causal").square().sum(), (q, k, v))
    loss = attend(q, k, v, mask="causal").square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    torch.testing.assert_close([q.grad, k.grad, v.grad], list(want))


def test_the_backward_keeps_to_the_backends_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    q, k, v = qkv()
    with fastattn.use_backend("reference"):
        out = attend(q, k, v)
    with fastattn.use_backend("torch"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
        out = attend(q, k, v)
    out.sum().backward()
    assert served() == {"reference": 1, "reference.backward": 1, "torch": 1, "torch.backward": 1}


def test_nothing_outlives_the_graph() -> None:
    """What is saved goes with the graph, without the garbage collector's help: it may be gigabytes."""
    q, k, v = qkv()
    gc.collect()
    gc.disable()
    try:
        hidden = k * 1
        gone = weakref.ref(hidden)
        out, lse = attend(q, hidden, v, return_lse=True)
        outputs = weakref.ref(out), weakref.ref(lse)
        del hidden
        assert gone() is not None
        out.sum().backward()
        assert gone() is None, "used, and not to be used again"
        del out, lse
        assert outputs[0]() is None and outputs[1]() is None
    finally:
        gc.enable()


def test_a_backward_from_another_thread() -> None:
    import threading

    q, k, v = qkv()
    want = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    out = attend(q, k, v)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(out.sum(), (q, k, v))))
    thread.start()
    thread.join()
    torch.testing.assert_close(tuple(found), want, rtol=0, atol=0)


def test_inputs_that_are_views_of_one_memory() -> None:
    """q, k and v as one projection makes them."""
    x = torch.randn(2, 6, 3 * 4 * 8, requires_grad=True)
    found = []
    for function in (attend, operator):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in x.chunk(3, -1))
        found.append(torch.autograd.grad(function(q, k, v, mask="causal", backend="torch").square().sum(), x)[0])
    assert same(*found)


def test_case_without_gradients_makes_no_graph() -> None:
    inputs = make(Case(dtype=FP32))
    assert attend(inputs.q, inputs.k, inputs.v).grad_fn is None
