"""The fast path for calls of a kind that was served before: what a kind is, and that it does what the full path does.

Every test compares with the full path, which is the same call with nothing cached.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported

from cases import BF16, FP16, FP32, FP64, Watcher, make
from features import FEATURES
from op_arguments import BAD, good
from served import Served
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import fastattn
from fastattn import Intervals, Segments, debug
from fastattn.backends import torch as torch_sdpa
from fastattn.backends.base import Refusal
from fastattn.dispatch import fast_path, registry, routes
from fastattn.dispatch import operators as ops
from fastattn.dispatch.native import calls as native
from fastattn.shape_cache import Section
from fastattn.validation import Arguments

pytestmark = pytest.mark.usefixtures("way")

attend = fastattn.scaled_dot_product_attention
#: The op's arguments in order.
PARAMETERS = list(inspect.signature(attend).parameters)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, fresh_caches: None, fresh_warnings: None) -> None:
    """No settings of the machine's, nothing cached by other tests."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(debug, "ENABLED", False)


@pytest.fixture
def full_paths(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call that went the full path."""
    taken: list[Any] = []
    monkeypatch.setattr(ops, "attention", lambda *args, full_path=ops.attention: taken.append(1) or full_path(*args))
    return taken


def forget() -> None:
    fast_path._cached.clear()
    if native.module is not None:
        native.module.clear()
    routes._routes.clear()


def key_of(**arguments: Any) -> Any:
    """The key of a call, as the op computes it."""
    defaults = {n: None if p.default is p.empty else p.default for n, p in inspect.signature(attend).parameters.items()}
    arguments = defaults | arguments
    scale, backend = arguments.pop("scale"), arguments.pop("backend")
    return fast_path.key_of(Arguments(**arguments), scale, backend)


# What is in a key.

B, H, HKV, SQ, SKV, D = 2, 4, 2, 3, 5, 8


def ints(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape, dtype=torch.int32)


def full() -> dict[str, Any]:
    """Every argument given; fresh data each time."""
    return {
        "q": torch.randn(B, H, SQ, D),
        "k": torch.randn(B, HKV, SKV, D),
        "v": torch.randn(B, HKV, SKV, D),
        "scale": 0.5,
        "mask": Intervals(ints(B, SQ), ints(B, SQ)),
        "sinks": torch.randn(H),
        "window": (2, 1),
        "softcap": 2.0,
        "q_lengths": ints(B),
        "kv_lengths": ints(B),
        "return_lse": True,
        "backend": None,
    }


def strided(x: Tensor) -> Tensor:
    """The same shape in another layout, and with a last stride other than 1."""
    return torch.randn(*x.shape, 2).to(x.dtype)[..., 0]


def _tensor_changes(x: Tensor) -> dict[str, Any]:
    dtype = torch.int64 if x.dtype == torch.int32 else BF16
    return {
        "longer": torch.cat([x, x[-1:]]),
        "one dim more": x[None],
        "strides": strided(x),
        "broadcast": x[:1].expand_as(x),
        "dtype": x.to(dtype),
        "device": x.to("meta"),
        "sparse": x.to_sparse(),
    }


def _changes() -> dict[str, dict[str, Any]]:
    """label -> the arguments that differ from `full`, in one thing that is not data."""
    base = full()
    changes: dict[str, dict[str, Any]] = {}
    for name in ("q", "k", "v", "sinks", "q_lengths", "kv_lengths"):
        changes |= {f"{name}: {what}": {name: x} for what, x in _tensor_changes(base[name]).items()}
    for name in ("q", "k", "v"):
        x = base[name]
        changes |= {
            f"{name}: token-major": {name: x.transpose(1, 2).contiguous().transpose(1, 2)},
            f"{name}: a cache's": {name: torch.randn(B, x.shape[1], 9, D)[:, :, : x.shape[2]]},
            f"{name}: float16": {name: x.half()},
            f"{name}: parameter": {name: Parameter(x)},
            f"{name}: requires a gradient": {name: x.clone().requires_grad_()},
            f"{name}: no tensor": {name: None},
        }
        changes |= {f"{name}: dim {i}": {name: torch.cat([x, x], i)} for i in range(4)}
    for side, name in enumerate(("lo", "hi")):
        for what, x in _tensor_changes(base["mask"][side]).items():
            changes[f"mask.{name}: {what}"] = {"mask": base["mask"]._replace(**{name: x})}
    shared = ints(B, 1)
    changes |= {
        "mask: none": {"mask": None},
        "mask: causal": {"mask": "causal"},
        "mask: another string": {"mask": "causal "},
        "mask: bool": {"mask": torch.ones(SQ, SKV, dtype=torch.bool)},
        "mask: additive": {"mask": torch.ones(SQ, SKV)},
        "mask: intervals of entries": {"mask": Intervals(shared, shared)},
        **{
            f"mask: segments, {n} {causal}": {"mask": Segments(ints(n, 2), causal)}
            for n in (2, 3, 4, 5)
            for causal in (0, 1)
        },
        "mask: segments": {"mask": Segments(ints(3, 2))},
        "mask: causal segments": {"mask": Segments(ints(3, 2), True)},
        "mask: a plain pair": {"mask": tuple(base["mask"])},
        "mask: its names": {"mask": tuple((x.shape, x.stride(), x.dtype, x.device) for x in base["mask"])},
        **{f"{name}: absent": {name: None} for name in ("sinks", "window", "softcap", "q_lengths", "kv_lengths")},
        "sinks: require a gradient": {"sinks": torch.randn(H, requires_grad=True)},
        "sinks: float64": {"sinks": torch.randn(H).double()},
        "sinks, lengths: the other one": {"sinks": None, "q_lengths": torch.randn(H)},
        "window: left": {"window": (3, 1)},
        "window: right": {"window": (2, 0)},
        "window: open": {"window": (2, -1)},
        "window: floats": {"window": (2.0, 1.0)},
        "window: bool": {"window": (2, True)},
        "window: list": {"window": [2, 1]},
        "window: three": {"window": (2, 1, 1)},
        "softcap: value": {"softcap": 2.5},
        "softcap: int": {"softcap": 2},
        "scale: int": {"scale": 1},
        "scale: bool": {"scale": True},
        "scale: tensor": {"scale": torch.tensor(0.5)},
        "scale: zero": {"scale": 0.0},
        "scale: negative": {"scale": -0.5},
        "scale: infinite": {"scale": float("inf")},
        "scale: nan": {"scale": float("nan")},
        "return_lse: off": {"return_lse": False},
        "return_lse: 1": {"return_lse": 1},
        **{f"backend: {name}": {"backend": name} for name in registry.NAMES},
        "backend: list": {"backend": ["torch"]},
        "backend: names": {"backend": registry.NAMES},
    }
    return changes


CHANGES = _changes()


def test_every_argument_is_changed() -> None:
    """A new argument of the op that nobody added to `CHANGES` may be missing in the name too."""
    assert {name for changes in CHANGES.values() for name in changes} == set(PARAMETERS)


@pytest.mark.parametrize("label", CHANGES)
def test_what_is_not_data_is_in_the_key(label: str) -> None:
    base = full()
    name = key_of(**base)
    assert name is not None
    other = key_of(**(base | CHANGES[label]))
    assert other is None or other != name
    hash(other)


@pytest.mark.parametrize(
    "label", [label for label in CHANGES if label not in ("return_lse: off", "backend: reference")]
)
def test_what_is_not_data_is_in_the_native_key(label: str, way: str) -> None:
    """A call is not served as one that it is like but for one thing: it gives what it gives where that one is not
    known."""
    base = full() | {"return_lse": False, "backend": "reference"}
    other = base | CHANGES[label]
    want = outcome(lambda: attend(**other))
    forget()
    for _ in range(3):
        attend(**base)
    module = native.module if way == "native" else None
    before = module.served() if module else None
    assert outcome(lambda: attend(**other)) == want
    assert module is None or (module.size() and module.served() == before)


@pytest.mark.parametrize("absent", [(), ("mask",), ("sinks", "window", "softcap", "q_lengths", "kv_lengths")], ids=str)
def test_data_is_not_in_the_name(absent: tuple[str, ...]) -> None:
    without = dict.fromkeys(absent)
    name = key_of(**(full() | without))
    assert name is not None
    for scale in (None, 0.25, 1e-20, 3.0):
        other = key_of(**(full() | without | {"scale": scale}))
        assert other == name and hash(other) == hash(name)


def test_tensors_that_change_places_have_other_names() -> None:
    """Lengths for queries are not lengths for keys, lo is not hi, k is not v."""
    base = full() | {"kv_lengths": None, "v": torch.randn(B, HKV, SKV, 2 * D)[..., :D]}
    other = base | {"q_lengths": None, "kv_lengths": base["q_lengths"]}
    assert key_of(**base) != key_of(**other)
    assert key_of(**base) != key_of(**(base | {"k": base["v"], "v": base["k"]}))
    lo, hi = ints(B, SQ), strided(ints(B, SQ))
    assert key_of(**(base | {"mask": Intervals(lo, hi)})) != key_of(**(base | {"mask": Intervals(hi, lo)}))


def test_segments_have_names_of_their_own() -> None:
    tables = [ints(3, 2), ints(5, 2), ints(3, 4), ints(2, 3).T, ints(3, 2).long()]
    names = [key_of(**(full() | {"mask": Segments(t, causal)})) for t in tables for causal in (False, True)]
    assert None not in names and len(set(names)) == 2 * len(tables)
    assert key_of(**(full() | {"mask": Segments(ints(3, 2), True)})) == names[1], "their values are data"
    for causal in (1, 0, None, "yes", torch.tensor(True)):
        assert key_of(**(full() | {"mask": Segments(tables[0], causal)})) is None


def test_the_allowed_backends_are_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    base = full()
    names = [key_of(**base)]
    for context in (("torch",), ("reference",), ("torch", "reference"), ("reference", "torch")):
        with fastattn.use_backend(*context):
            names.append(key_of(**base))
    for variable, value in (("FASTATTN_CUDNN", "0"), ("FASTATTN_BACKENDS", "decode,torch")):
        monkeypatch.setenv(variable, value)
        names.append(key_of(**base))
    assert len(set(names)) == len(names) == 7
    insisting = base | {"backend": "reference"}
    name = key_of(**insisting)
    monkeypatch.undo()
    with fastattn.use_backend("torch"):
        assert key_of(**insisting) == name, "the argument wins: what is allowed does not matter"


def test_a_switch_reaches_a_call_that_was_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    arguments = good()
    for _ in range(2):
        attend(**arguments)
    with fastattn.use_backend("reference"):
        attend(**arguments)
    monkeypatch.setenv("FASTATTN_BACKENDS", "reference")
    attend(**arguments)
    monkeypatch.delenv("FASTATTN_BACKENDS")
    attend(**arguments, backend="reference")
    attend(**arguments)
    assert served() == {"torch": 3, "reference": 3}


# Bad calls after good ones.


def _remember_good_calls() -> None:
    """One call like each of the bad ones would be were it not for its fault."""
    options: list[dict[str, Any]] = [
        {},
        {"scale": 1.0},
        {"window": (1, 0)},
        {"window": (0, 1)},
        {"softcap": 1.0},
        {"return_lse": True},
        {"mask": "causal"},
        {"mask": Intervals(ints(B, 5), ints(B, 5))},
        {"mask": Intervals(ints(B, 1), ints(B, 1))},
        {"sinks": torch.zeros(H)},
        {"q_lengths": ints(B)},
        {"kv_lengths": ints(B)},
        {"backend": "torch"},
        {"backend": "reference"},
    ]
    for option in options:
        for _ in range(2):
            attend(**good(), **option)
    assert len(fast_path._cached) == len(options) - 1, "of all but scale, which is data"


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives: its results and what autograd knows of them, or its error."""
    try:
        found = call()
    except Exception as error:
        return type(error), str(error)
    results = found if isinstance(found, (tuple, list)) else (found,)
    return [_facts(x) if isinstance(x, Tensor) else x for x in results]


def _facts(x: Tensor) -> Any:
    data = x.is_meta or x.detach().double().nan_to_num(1e30).flatten().tolist()
    node = None if x.grad_fn is None else type(x.grad_fn).__name__.replace("CppFunction", "_AttentionBackward")
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, node, x.is_inference(), data


EQUAL = [
    ("scale", True), ("scale", 1 + 0j), ("softcap", True), ("window", (True, False)), ("window", (1.0, 0.0)),
    ("window", (1, False)), ("window", (0, 1.0)), ("window", (0, True)), ("return_lse", 1), ("return_lse", 0),
    ("return_lse", 1.0), ("return_lse", 0.0), ("backend", ("torch",)), ("backend", ["reference"]),
    ("mask", (ints(2, 5), ints(2, 5))), ("mask", [ints(2, 1), ints(2, 1)]), ("mask", ((), ())), ("q_lengths", (1, 1)),
    ("mask", tuple((x.shape, x.stride(), x.dtype, x.device) for x in (ints(2, 5), ints(2, 5)))),
    ("sinks", (torch.Size([4]), (1,), torch.float32, torch.device("cpu"))), ("scale", "1.0"), ("softcap", {}),
    ("window", {1, 0}), ("sinks", {}), ("kv_lengths", []), ("return_lse", []), ("mask", {}), ("scale", {}),
]  # fmt: skip
WRONG = [*((name, value) for name, values in BAD.items() for value in values), *EQUAL]


@pytest.mark.parametrize("name, value", WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_a_bad_call_after_good_ones_fails_as_it_does_first(name: str, value: Any) -> None:
    arguments = good() | {name: value}
    want = outcome(lambda: attend(**arguments))
    assert isinstance(want, tuple) and issubclass(want[0], (ValueError, TypeError)), want
    assert not fast_path._cached
    _remember_good_calls()
    before = dict(fast_path._cached), fastattn.stats()["calls"]
    for _ in range(2):
        assert outcome(lambda: attend(**arguments)) == want
    assert (dict(fast_path._cached), fastattn.stats()["calls"]) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "mask.lo", "sinks", "q_lengths", "kv_lengths"])
def test_a_nested_tensor_anywhere(name: str, layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, D), torch.ones(3, D)], layout=layout)
    if name in ("mask.lo", "q_lengths", "kv_lengths"):
        nested = nested.int()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{name}: expected a dense"):
            attend(**(good() | ({"mask": Intervals(nested, nested)} if name == "mask.lo" else {name: nested})))
        _remember_good_calls()
        fastattn.clear_plans()


@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("name", ["q", "sinks", "mask"])
def test_other_layouts_after_good_calls(name: str, convert: str) -> None:
    x = {"q": torch.ones(B, H, 5, D), "sinks": torch.ones(H, H), "mask": torch.ones(5, 7)}[name]
    if convert == "to_mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("no MKL-DNN")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # compressed layouts are in beta, says torch
        arguments = good() | {name: getattr(x, convert)()}
    _remember_good_calls()
    with pytest.raises(ValueError, match=f"^{name}: expected a dense"):
        attend(**arguments)


# Who watches, and who wants gradients.


class Marked(Tensor):
    """A subclass that wants its own kind back."""


def _watched(q: Tensor, k: Tensor, v: Tensor) -> Any:
    with Watcher() as watcher:
        out = attend(q, k, v)
    assert "fastattn.attention.default" in watcher.seen
    return [out, *watcher.seen]


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Any:
    with FakeTensorMode() as mode:
        out = attend(*(mode.from_tensor(x) for x in (q, k, v)))
    return [type(out).__name__, tuple(out.shape), out.stride(), out.dtype]


def _within(context: Callable[[], Any], *wanting: int) -> Callable[..., Any]:
    def call(*qkv: Tensor) -> Any:
        inputs = [x.clone().requires_grad_(i in wanting) for i, x in enumerate(qkv)]
        with context():
            return attend(*inputs)

    return call


def _differentiated(**options: Any) -> Callable[..., Any]:
    """The gradients of everything that can have one."""

    def call(*qkv: Tensor) -> Any:
        inputs = [x.clone().requires_grad_() for x in qkv]
        own = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in options.items()}
        out = attend(*inputs, **own)
        leaves = [*inputs, *(x for x in own.values() if x.requires_grad)]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    return call


def _only(name: str, context: Callable[[], Any] = contextlib.nullcontext) -> Callable[..., Any]:
    """Nothing wants a gradient but the sinks or the mask."""

    def call(*qkv: Tensor) -> Any:
        x = torch.linspace(-1, 1, H) if name == "sinks" else torch.linspace(-1, 1, SKV)
        x.requires_grad_()
        with context():
            out = attend(*qkv, **{name: x})
        return [out, *(torch.autograd.grad(out.square().sum(), x) if out.requires_grad else ())]

    return call


def _autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype)


SITUATIONS: dict[str, Callable[..., Any]] = {
    "plain": attend,
    "parameters": lambda q, k, v: attend(*(Parameter(x) for x in (q, k, v))),
    "parameters without gradients": lambda *qkv: attend(*(Parameter(x, requires_grad=False) for x in qkv)),
    "a subclass": lambda q, k, v: attend(q.as_subclass(Marked), k, v),
    "a subclass for values": lambda q, k, v: attend(q, k, v.as_subclass(Marked)),
    "meta": lambda *qkv: attend(*(x.to("meta") for x in qkv)),
    "fake tensors": _fake,
    "a dispatch mode": _watched,
    "vmap": lambda q, k, v: torch.vmap(lambda x: attend(x, k, v))(torch.stack([q, q])),
    "functional gradient": lambda q, k, v: torch.func.grad(lambda x: attend(x, k, v).sum())(q),
    "gradient of q": _within(contextlib.nullcontext, 0),
    "gradient of k": _within(contextlib.nullcontext, 1),
    "gradient of v": _within(contextlib.nullcontext, 2),
    "no_grad": _within(torch.no_grad, 0, 1, 2),
    "inference mode": _within(torch.inference_mode, 0),
    "enable_grad": _within(torch.enable_grad, 1),
    "autocast": _within(_autocast(BF16)),
    "autocast to float16": _within(_autocast(FP16)),
    "autocast with gradients": _within(_autocast(BF16), 0, 1, 2),
    "autocast switched off": _within(lambda: torch.autocast("cpu", BF16, enabled=False)),
    "deterministic": _within(lambda: torch.utils.deterministic.DeterministicGuard(True), 0)
    if hasattr(torch.utils.deterministic, "DeterministicGuard")
    else attend,
    "all gradients": _differentiated(),
    "all gradients with sinks": _differentiated(sinks=torch.ones(H)),
    "all gradients with a mask": _differentiated(mask=torch.ones(SQ, SKV)),
    "only the sinks want one": _only("sinks"),
    "only the sinks, without gradients": _only("sinks", torch.no_grad),
    "only the mask wants one": _only("mask"),
    "only the mask, without gradients": _only("mask", torch.no_grad),
    "sinks that are a parameter": lambda q, k, v: attend(q, k, v, sinks=Parameter(torch.ones(H))),
    "mixed dtypes, q wider": lambda q, k, v: attend(q, k.bfloat16(), v.bfloat16()),
    "mixed dtypes, v wider": lambda q, k, v: attend(q.half(), k.bfloat16(), v),
    "mixed halves": lambda q, k, v: attend(q.half(), k.bfloat16(), v.half(), backend="reference"),
    "mixed with float64": lambda q, k, v: attend(q, k.double(), v),
    "scale zero": lambda q, k, v: attend(q, k, v, scale=0.0),
    "scale negative": lambda q, k, v: attend(q, k, v, scale=-0.3),
    "scale an int": lambda q, k, v: attend(q, k, v, scale=1),
    "window a list": lambda q, k, v: attend(q, k, v, window=[2, 1]),
    "negative view": lambda q, k, v: attend(torch._neg_view(q), k, v),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_as_with_nothing_cached(situation: str) -> None:
    """First with the memory cleared before, then among calls that the situation must not be taken for."""
    call = SITUATIONS[situation]
    qkv = full()["q"], full()["k"], full()["v"]
    others = [x.flip(0) for x in qkv]

    def fresh(function: Callable[..., Any], inputs: Any) -> Any:
        forget()
        return outcome(lambda: function(*inputs))

    want, want_others, want_plain = fresh(call, qkv), fresh(call, others), fresh(attend, others)
    forget()
    for options in ({"mask": torch.ones(SQ, SKV)}, {"sinks": torch.ones(H)}, {"scale": 0.3}, {"window": (2, 1)}, {}):
        for dtype in (FP32, BF16, FP16, FP64):
            attend(*(x.to(dtype) for x in qkv), **options)
    for turn in range(2):  # after calls without any circumstances; after itself
        assert outcome(lambda: call(*qkv)) == want, turn
    assert outcome(lambda: call(*others)) == want_others, "of other data"
    forget()
    outcome(lambda: call(*qkv))
    assert outcome(lambda: attend(*others)) == want_plain, "a call without any circumstances after it"


def test_calls_that_want_gradients_are_of_another_kind() -> None:
    arguments = good()
    arguments["k"].requires_grad_()
    attend(**arguments)
    attend(**good(), sinks=torch.zeros(H, requires_grad=True))
    assert [bound.static[-1] for bound in fast_path._cached.values()] == ["k", "s"]
    attend(**good(), mask=torch.zeros(5, 7))
    assert len(fast_path._cached) == 2, "validation makes a mask of four dims of it"
    with torch.no_grad():
        attend(**arguments)
    assert [bound.static[-1] for bound in fast_path._cached.values()] == ["k", "s", ""]
    assert attend(**arguments).requires_grad


# The fast path itself.

BOTH = [(name, backend) for name in FEATURES for backend in ("torch", "reference")]


def _fast_is_full(name: str, backend: str | None, full_paths: list[Any], seed: int, **changes: Any) -> None:
    """The same bits, of other data than those of the call that was cached."""
    case = FEATURES[name].but(**changes)
    first, second = make(case, seed=seed), make(case, seed=seed + 1)
    if fastattn.explain(first.q, first.k, first.v, **first.options, backend=backend).chosen is None:
        return
    forget()
    attend(first.q, first.k, first.v, **first.options, backend=backend)
    full_paths.clear()
    got = attend(second.q, second.k, second.v, **second.options, backend=backend)
    mask = second.options.get("mask")
    odd = isinstance(mask, Tensor) and mask.dim() != 4
    assert len(full_paths) == (odd or (case.scale is not None and case.scale <= 0)), "the path that it took"
    forget()
    want = attend(second.q, second.k, second.v, **second.options, backend=backend)
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want))):
        assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
    assert isinstance(got, tuple) == case.return_lse


@pytest.mark.parametrize("name", FEATURES)
def test_fast_path_equals_full_path(name: str, full_paths: list[Any], seed: int) -> None:
    for dtype in (FP32, BF16):
        for backend in (None, "torch", "reference"):
            for return_lse in (False, True):
                _fast_is_full(name, backend, full_paths, seed, dtype=dtype, return_lse=return_lse)


@pytest.mark.parametrize(
    "name",
    ["causal", "window", "intervals-bq", "intervals-lengths", "sinks-window", "softcap", "lengths-causal", "scale",
     "layout-sliced", "layout-dmajor", "layout-strided", "one-query"],
)  # fmt: skip
def test_fast_path_equals_full_path_on_the_decode_kernel(
    name: str, full_paths: list[Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run natively")
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = FEATURES[name].but(dtype=FP32)
    inputs = make(case)
    assert fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options, backend="decode").chosen == "decode"
    _fast_is_full(name, "decode", full_paths, seed, dtype=FP32, return_lse=True)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_negative_views_are_resolved_for_kernels_that_read_memory(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the sign of a conjugate's imaginary part in a bit, not in memory."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run natively")
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = {name: full()[name] for name in "qkv"}
    negated = arguments | {which: torch._neg_view(arguments[which])}
    want = attend(**(arguments | {which: -arguments[which]}), backend="reference")
    for _ in range(2):
        attend(**arguments, backend="decode")  # whose like is cached
        torch.testing.assert_close(attend(**negated, backend="decode"), want)


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks", "lo", "kv_lengths"])
def test_calls_of_other_strides_are_bound_anew(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the full path, where gradients are wanted: what a backend binds knows the strides."""
    bound: list[Any] = []
    bind = torch_sdpa.TorchBackend.bind
    monkeypatch.setattr(
        torch_sdpa.TorchBackend, "bind", lambda self, p, c: bound.append(getattr(c, which).stride()) or bind(self, p, c)
    )
    monkeypatch.setattr(torch_sdpa.TorchBackend, "reasons", lambda *_: [])
    base = full() | {"softcap": None, "return_lse": False, "backend": "torch"}
    x = base["mask"].lo if which == "lo" else base[which]
    other = base | ({"mask": base["mask"]._replace(lo=strided(x))} if which == "lo" else {which: strided(x)})
    for wants in (False, True):
        bound.clear()
        for arguments in (base, other, base, other):
            attend(**(arguments | {"q": arguments["q"].detach().requires_grad_(wants)}))
        assert bound == [x.stride(), strided(x).stride()]


def test_the_fast_path_is_counted() -> None:
    served = Served()
    for _ in range(5):
        attend(**good())
    assert served() == {"torch": 5}


def test_what_is_cached_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "_cached", Section("test", 4))
    for length in range(1, 12):
        q = torch.randn(1, 2, length, D)
        torch.testing.assert_close(attend(q, q, q), attend(q, q, q, backend="reference"))
        assert len(fast_path._cached) <= 4


def test_the_default_scale_is_that_of_the_head_dim() -> None:
    q, k, v = full()["q"], full()["k"], full()["v"]
    attend(q, k, v, scale=0.125)  # what is cached came with a scale
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, scale=D**-0.5))
    assert len(fast_path._cached) == 1


# Debugging.


def test_debugging_checks_calls_that_were_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = good() | {"kv_lengths": torch.tensor([8, 1], dtype=torch.int32)}
    for _ in range(2):
        attend(**arguments)
    monkeypatch.setattr(debug, "ENABLED", True)
    assert key_of(**arguments) is None
    with pytest.raises(ValueError, match=r"^kv_lengths: expected lengths in 0\.\.7"):
        attend(**arguments)
    monkeypatch.setattr(debug, "ENABLED", False)
    attend(**arguments)


def test_debugging_checks_results_of_calls_that_were_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled: list[bool] = []
    bind = torch_sdpa.TorchBackend.bind

    def spoiling(self: Any, problem: Any, call: Any) -> Any:
        kernel = bind(self, problem, call)

        def forward(call: Any) -> Any:
            out, lse = kernel.forward(call)
            return (out * torch.nan if spoiled else out), lse

        return SimpleNamespace(forward=forward)

    monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", spoiling)
    for _ in range(2):
        attend(**good())
    spoiled.append(True)
    assert attend(**good()).isnan().all()
    monkeypatch.setattr(debug, "ENABLED", True)
    with pytest.raises(AssertionError, match="torch: finite inputs"):
        attend(**good())


# Backends that refuse late.


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A torch backend that serves until its "mood" is set to an exception."""
    state: dict[str, Any] = {"mood": None, "asked": 0}
    bind = torch_sdpa.TorchBackend.bind

    def moody(self: Any, problem: Any, call: Any) -> Any:
        kernel = bind(self, problem, call)

        def forward(call: Any) -> Any:
            state["asked"] += 1
            if state["mood"] is not None:
                raise state["mood"]
            return kernel.forward(call)

        return SimpleNamespace(forward=forward)

    monkeypatch.setattr(torch_sdpa.TorchBackend, "bind", moody)
    return state


def test_a_cached_route_that_refuses_falls_through(moody: dict[str, Any], full_paths: list[Any]) -> None:
    arguments = good()
    want = attend(**arguments, backend="reference")
    other = {"q": torch.randn(1, 2, 3, D), "k": torch.randn(1, 2, 3, D), "v": torch.randn(1, 2, 3, D)}
    for _ in range(2):
        attend(**arguments)
        attend(**other)
    moody |= {"mood": Refusal("no plan today"), "asked": 0}
    full_paths.clear()
    with pytest.warns(fastattn.FastattnWarning, match="torch refused a call that it should serve .no plan today"):
        assert torch.equal(attend(**arguments), want)
    assert (moody["asked"], len(full_paths)) == (1, 1), "asked once, by the fast path; then the full path"
    before = fastattn.stats()["calls"]["reference"]
    assert torch.equal(attend(**arguments), want)
    assert (moody["asked"], len(full_paths)) == (1, 1), "the fast path, to the backend that serves it now"
    assert fastattn.stats()["calls"]["reference"] == before + 1
    moody["mood"] = None
    attend(**other)
    assert moody["asked"] == 2, "another problem is still that backend's"


def test_a_refusal_is_not_cached_as_a_result(moody: dict[str, Any]) -> None:
    arguments = good() | {"backend": "torch"}
    for _ in range(2):
        attend(**arguments)
    moody["mood"] = Refusal("no plan today")
    with pytest.warns(fastattn.FastattnWarning, match="no plan today"):
        with pytest.raises(fastattn.BackendError, match="torch: no plan today"):
            attend(**arguments)
    assert not fast_path._cached
    with pytest.raises(fastattn.BackendError, match="torch: no plan today"):
        attend(**arguments)
    assert not fast_path._cached


def test_other_errors_pass_through_the_fast_path(moody: dict[str, Any]) -> None:
    for _ in range(2):
        attend(**good())
    moody["mood"] = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        attend(**good())
    moody["mood"] = None
    attend(**good())
    assert fastattn.explain(**good()).chosen == "torch"


def test_a_first_call_that_is_refused_is_cached_where_it_was_served(moody: dict[str, Any]) -> None:
    moody["mood"] = Refusal("not ever")
    with pytest.warns(fastattn.FastattnWarning, match="not ever"):
        attend(**good())
    (known,) = fast_path._cached.values()
    assert known.route.backend.name == "reference"
