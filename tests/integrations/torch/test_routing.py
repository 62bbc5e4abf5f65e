"""Who serves a call of the drop-in, what it says about that, and what it remembers."""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import own_caches
from emulated import emulate
from served import Served
from stand_in_backend import StandIn, stand_in_binaries
from stand_in_compiler import Flags
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_calls import (
    BF16,
    FP16,
    FP32,
    FP64,
    TORCHS,
    WAYS,
    TorchCall,
    assert_right,
    check_gradients,
    default_backends,
    error,
    make,
    truth,
    way,
)

import fastattn
from fastattn import drop_in
from fastattn._compat import sdpa as torchs
from fastattn.backends.base import Setback
from fastattn.backends.reference import ReferenceBackend
from fastattn.dispatch import preference, registry
from fastattn.integrations.torch import decide, known, sdpa
from fastattn.integrations.torch.translate import translate

pytestmark = [
    pytest.mark.usefixtures("default_backends"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
__all__ = ["default_backends"]
SDPA = drop_in.scaled_dot_product_attention


class Handed:
    """The calls handed to torch since this was made, by reason."""

    def __init__(self) -> None:
        self._before = Counter(fastattn.stats()["handed_to_torch"])

    def __call__(self) -> dict[str, int]:
        return dict(Counter(fastattn.stats()["handed_to_torch"]) - self._before)


def test_a_cpus_calls_are_torchs() -> None:
    q = torch.randn(1, 2, 4, 8)
    handed = Handed()
    SDPA(q, q, q)
    assert handed() == {decide.ON_A_CPU: 1}
    found = drop_in.explain(q, q, q)
    assert found.chosen == "torch" and found.reason == decide.KERNELS
    assert "torch's own function" in str(found) and "cuDNN" in str(found)


@pytest.mark.parametrize(
    "names, chosen",
    [
        (("reference",), "reference"),
        (("reference", "torch"), "reference"),  # what comes before torch's kernels is asked
        (("torch",), "torch"),
        (("torch", "reference"), "torch"),
        (("cudnn", "reference"), "reference"),
        (("cudnn", "torch", "reference"), "torch"),
        (("cudnn",), "torch"),  # whom nobody else serves torch serves: a drop-in does not fail
    ],
)
def test_the_list_of_backends(names: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 4, 8)
    want = {} if chosen == "torch" else {chosen: 1}
    with fastattn.use_backend(*names):
        served = Served()
        SDPA(q, q, q, is_causal=True)
        assert served() == want
        assert drop_in.explain(q, q, q, is_causal=True).chosen == chosen
    monkeypatch.setenv("FASTATTN_BACKENDS", ",".join(names))
    served = Served()
    SDPA(q, q, q, is_causal=True)
    assert served() == want


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 2, 8)], layout=torch.jagged).transpose(1, 2)


Q = torch.randn(1, 2, 4, 8)
REASONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    decide.DROPOUT: ((Q, Q, Q, None, 0.5), {}),
    decide.TYPES: ((Q, Q, Q), {"scale": torch.tensor(0.5)}),
    "query, key and value of several dtypes": ((Q, Q.half(), Q), {}),
    "a mask whose shape does not broadcast": ((Q, Q, Q, torch.ones(3, 4).bool()), {}),
    "shapes that do not match": ((Q, Q[..., :4], Q), {}),
    "fastattn does not take this scale": ((Q, Q, Q), {"scale": math.nan}),
    decide.CLASS: ((nested(),) * 3, {}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason: str) -> None:
    """They are counted, and explained in the same words."""
    arguments, options = REASONS[reason]
    with fastattn.use_backend("reference"):
        served, handed = Served(), Handed()
        try:
            found = SDPA(*arguments, **options)
        except RuntimeError:  # test_errors.py looks at it
            with pytest.raises(RuntimeError):
                TORCHS(*arguments, **options)
        else:
            assert found.shape == TORCHS(*arguments, **options).shape
        ((why, count),) = handed().items()
        assert why.startswith(reason) and count == 1
        assert served() == {}
        explained = drop_in.explain(*arguments, **options)
    assert explained.chosen == "torch"
    assert explained.reason.startswith(reason)


def test_explain_says_what_serves_dropout() -> None:
    with fastattn.use_backend("reference"):
        text = str(drop_in.explain(Q, Q, Q, dropout_p=0.1))
    assert text.startswith("torch's own function: dropout")


# Torch's switches


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_sdpa_kernel_is_honoured(kernel: SDPBackend) -> None:
    with fastattn.use_backend("reference"):
        with sdpa_kernel(kernel):
            handed = Handed()
            assert drop_in.explain(Q, Q, Q).reason == decide.CHOSEN
            if kernel is not SDPBackend.EFFICIENT_ATTENTION:  # which a CPU has not
                assert torch.equal(SDPA(Q, Q, Q), TORCHS(Q, Q, Q))
                assert handed() == {decide.CHOSEN: 1}
        with way("reference"):
            SDPA(Q, Q, Q)


@pytest.mark.parametrize("name", ["flash", "mem_efficient", "math", "cudnn"])
def test_switches_are_honoured(name: str) -> None:
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    with fastattn.use_backend("reference"):
        switch(False)
        try:
            assert drop_in.explain(Q, Q, Q).reason == decide.CHOSEN
        finally:
            switch(True)
        assert drop_in.explain(Q, Q, Q).chosen == "reference"


def test_an_order_of_kernels_is_honoured() -> None:
    every = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with fastattn.use_backend("reference"):
        with sdpa_kernel(every, set_priority=True):
            assert drop_in.explain(Q, Q, Q).reason == decide.CHOSEN
        assert drop_in.explain(Q, Q, Q).chosen == "reference"


def test_the_order_that_torch_makes_itself_is_nobodys_choice() -> None:
    """Its first call on an H100 puts cuDNN's kernels first."""
    before = torch._C._get_sdp_priority_order()
    with fastattn.use_backend("reference"):
        torch._C._set_sdp_priority_order([3, 1, 2, 0, 4])  # cuDNN's, flash, efficient, math
        try:
            assert drop_in.explain(Q, Q, Q).chosen == "reference"
        finally:
            torch._C._set_sdp_priority_order(before)
        torch._C._set_sdp_priority_order([3, 2, 1, 0, 4])
        try:
            assert drop_in.explain(Q, Q, Q).reason == decide.CHOSEN
        finally:
            torch._C._set_sdp_priority_order(before)
        assert drop_in.explain(Q, Q, Q).chosen == "reference"


def test_without_names_of_torchs_kernels_an_order_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "_ORDER_ON_HOPPER", None)
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([3, 1, 2, 0, 4])
    try:
        assert drop_in.explain(Q, Q, Q).reason == decide.CHOSEN
    finally:
        torch._C._set_sdp_priority_order(before)


@pytest.mark.gpu
def test_a_call_of_torchs_on_a_gpu_chooses_nothing() -> None:
    q = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    SDPA(q, q, q)
    TORCHS(q, q, q)
    assert drop_in.explain(q, q, q).reason != decide.CHOSEN


def test_compiled_calls_honour_them_too() -> None:
    torch._dynamo.reset()
    with fastattn.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        served = Served()
        torch.compile(SDPA, fullgraph=True, backend="aot_eager")(Q, Q, Q)
        assert served() == {}


@pytest.mark.parametrize(
    "missing",
    ["_function_modes", "_function_mode", "_tracing", "_order"],
)
def test_a_torch_that_tells_less(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a private name of torch's calls are served as rightly."""
    monkeypatch.setattr(torchs, missing, None)
    with fastattn.use_backend("reference"), way("reference"):
        SDPA(Q, Q, Q)
    with torch.device("cpu"):
        assert error(SDPA(Q, Q, Q), truth(make(TorchCall(q=Q.shape, k=Q.shape)))) >= 0


# What is remembered


def test_kinds_of_calls_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of a call is a kind of its own; its data and its scale are none."""
    own_caches(monkeypatch)
    x = torch.randn(2, 2, 4, 8)
    mask = torch.ones(4, 4)
    with fastattn.use_backend("reference"):
        changes: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((x, x, x), {}),
            ((x, x, x), {"is_causal": True}),
            ((x, x, x), {"enable_gqa": True}),
            ((x, x[:1], x), {}),
            ((x, x, x, mask), {}),
            ((x, x, x, mask.bool()), {}),
            ((x, x, x, mask[:1]), {}),
            ((x, x, x, mask.clone().requires_grad_()), {}),
            ((x.clone().requires_grad_(), x, x), {}),
            ((x, x.clone().requires_grad_(), x), {}),
            ((x.double(), x.double(), x.double()), {}),
            ((x[:, :1], x, x), {}),
        ]
        for count, (arguments, options) in enumerate(changes, 1):
            for scale in (None, 0.5, 0.25):
                SDPA(*(a.clone() if not a.requires_grad else a for a in arguments), scale=scale, **options)
            assert len(decide._decisions) == count
        with torch.autocast("cpu", dtype=BF16):
            assert SDPA(x, x, x).dtype == BF16
    with fastattn.use_backend("reference", "torch"):
        SDPA(x, x, x)
    assert len(decide._decisions) == len(changes) + 2
    fastattn.clear_plans()
    assert not decide._decisions


def test_what_is_remembered_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    own_caches(monkeypatch)
    with fastattn.use_backend("reference"):
        for _ in range(3):
            for call in (TorchCall(), TorchCall(is_causal=True), TorchCall(mask="float:6,9"), TorchCall(scale=-1.0)):
                inputs = make(call)
                assert_right(inputs.call(SDPA), truth(inputs), FP32)


def test_a_setback_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that could not serve a call for a time is asked again."""
    own_caches(monkeypatch)
    real = ReferenceBackend.bind
    broken = True

    class Kernel:
        def forward(self, call: Any) -> Any:
            raise Setback("no memory")

    monkeypatch.setattr(
        ReferenceBackend, "bind", lambda self, problem, call: Kernel() if broken else real(self, problem, call)
    )
    inputs = make(TorchCall())
    with fastattn.use_backend("reference", "torch"), pytest.warns(fastattn.FastattnWarning, match="could not serve"):
        served = Served()
        assert_right(inputs.call(SDPA), truth(inputs), FP32)
        assert served() == {"torch": 1}  # the op's own next
    broken = False
    fastattn.clear_plans()
    with fastattn.use_backend("reference", "torch"):
        served = Served()
        inputs.call(SDPA)
        assert served() == {"reference": 1}


def test_nobody_waits_for_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's function serves until the binary of the only backend that comes before it is there."""
    own_caches(monkeypatch)
    go = tmp_path / "go"
    binaries = stand_in_binaries(tmp_path, monkeypatch)
    late = threading.Timer(10.0, go.touch)  # so that a call that waits ends
    late.start()
    try:
        StandIn(Flags(f"until {go}")).installed(monkeypatch)
        inputs = make(TorchCall())
        arguments = inputs.q, inputs.k, inputs.v
        with fastattn.use_backend("decode", "torch"):
            assert drop_in.explain(*arguments).chosen == "torch"  # and does not wait either: nobody said "go"
            served, handed = Served(), Handed()
            for _ in range(2):
                assert_right(inputs.call(SDPA), truth(inputs), FP32)
            assert served() == {} and handed() == {decide.KERNELS: 2}
            assert not decide._decisions and not known._known
            assert not go.exists()
            go.touch()
            assert binaries.wait(20.0)
            assert_right(inputs.call(SDPA), truth(inputs), FP32)
            assert served() == {"decode": 1}
            assert drop_in.explain(*arguments).chosen == "decode"
        assert binaries.stats()["background_compiles"] == 1 and binaries.stats()["compiles"] == 0
    finally:
        late.cancel()
        binaries.compilers.stop()


def test_a_kernel_that_nothing_compiles_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own_caches(monkeypatch)
    binaries = stand_in_binaries(tmp_path, monkeypatch)
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    try:
        StandIn(Flags("slow 0")).installed(monkeypatch)
        inputs = make(TorchCall())
        with fastattn.use_backend("decode", "torch"):
            assert_right(inputs.call(SDPA), truth(inputs), FP32)
        assert list(decide._decisions.values()) == [decide.Decision(decide.KERNELS)]
    finally:
        binaries.compilers.stop()


@pytest.mark.parametrize(
    "call, chosen",
    [
        (TorchCall(), "prefill"),
        (TorchCall(is_causal=True), "prefill"),
        (TorchCall(mask="bool:6,9"), "torch"),
        (TorchCall(q=(2, 4, 9, 8), k=(2, 4, 6, 8), is_causal=True), "torch"),
    ],
    ids=str,
)
def test_what_is_asked_before_torch_by_preference(
    call: TorchCall, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill kernel comes after torch's for most calls, and before them where these are slow."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    own_caches(monkeypatch)
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    rule = preference.Rule(lambda p: True, ("prefill",), "it was measured")
    inputs = make(call)
    with fastattn.use_backend("torch", "prefill"):  # somebody's own order
        assert drop_in.explain(inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options).chosen == "torch"
    names = tuple(name for name in registry.NAMES if name != "decode")
    with fastattn.use_backend(*names), torch.no_grad():
        explained = drop_in.explain(inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options)
        assert explained.chosen == "torch"
        own_caches(monkeypatch)
        monkeypatch.setattr(preference, "rule_for", lambda p: rule)
        served = Served()
        assert_right(inputs.call(SDPA), truth(inputs), FP32)
        assert served() == ({chosen: 1} if chosen != "torch" else {})


def test_stats_and_their_section() -> None:
    with fastattn.use_backend("reference"):
        SDPA(Q, Q, Q)
    found = fastattn.stats()
    assert found["cache"]["sections"]["drop-in"]["entries"] > 0
    assert all(isinstance(reason, str) for reason in found["handed_to_torch"])


# On cuDNN's plans, as torch computes them


EMULATED = {
    "plain": TorchCall(),
    "causal": TorchCall(k=(2, 4, 6, 8), is_causal=True),
    "causal, more keys": TorchCall(is_causal=True),
    "causal, more queries": TorchCall(q=(2, 4, 9, 8), k=(2, 4, 6, 8), is_causal=True),
    "padding": TorchCall(mask="bool:2,1,1,9"),
    "bool": TorchCall(mask="bool:2,4,6,9"),
    "float": TorchCall(mask="float:1,4,6,9"),
    "float32": TorchCall(mask="float32:6,9"),
    "three dims": TorchCall(q=(4, 6, 8), k=(4, 9, 8)),
    "three dims, mask": TorchCall(q=(4, 6, 8), k=(4, 9, 8), mask="bool:4,6,9"),
    "five dims": TorchCall(q=(2, 3, 2, 6, 8), k=(2, 3, 2, 9, 8), mask="bool:2,1,1,1,9"),
    "broadcast batch": TorchCall(q=(3, 4, 6, 8), k=(1, 4, 9, 8)),
    "broadcast head": TorchCall(k=(2, 1, 9, 8)),
    "one head of q": TorchCall(q=(2, 1, 6, 8)),
    "one head of v": TorchCall(v=(2, 1, 9, 8), mask="bool:2,4,6,9"),
    "grouped heads": TorchCall(k=(2, 2, 9, 8), enable_gqa=True, is_causal=True),
    "token-major": TorchCall(layout="token-major", is_causal=True),
    "poisoned": TorchCall(layout="part of longer rows"),
}


@pytest.mark.parametrize("case", EMULATED)
def test_on_cudnn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls on a backend of fused kernels. What it refuses, another one of the list serves."""
    emulate(monkeypatch)
    call = EMULATED[case].but(dtype=BF16)
    inputs = make(call)
    want = truth(inputs)
    with fastattn.use_backend("cudnn", "reference"):
        chosen = drop_in.explain(inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options).chosen
        served = Served()
        with torch.no_grad():
            found = inputs.call(SDPA)
        assert served() == {chosen: 1}
    assert chosen == "cudnn"
    assert_right(found, want, BF16)


@pytest.mark.parametrize("case", ["plain", "causal, more keys", "padding", "float", "three dims", "grouped heads"])
def test_gradients_on_cudnn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    monkeypatch.setitem(WAYS, "cudnn", ("cudnn", "reference"))
    check_gradients(EMULATED[case].but(dtype=BF16), "cudnn")


@pytest.mark.parametrize(
    "call, chosen",
    [
        (TorchCall(dtype=BF16), "cudnn"),
        (TorchCall(dtype=BF16, is_causal=True), "cudnn"),
        (TorchCall(dtype=BF16, mask="bool:6,9"), "slower"),
        (TorchCall(dtype=BF16, k=(2, 2, 9, 8), enable_gqa=True, mask="float:2,1,1,9"), "slower"),
        (TorchCall(dtype=BF16, q=(6, 8), k=(9, 8)), "cudnn"),
        (TorchCall(dtype=FP32), "torch"),
        (TorchCall(dtype=FP64), "torch"),
        (TorchCall(dtype=BF16, q=(2, 4, 9, 8), k=(2, 4, 6, 8), is_causal=True), "cudnn"),
        (TorchCall(dtype=BF16, q=(2, 4, 6, 300), k=(2, 4, 9, 300)), "torch"),
    ],
    ids=str,
)
def test_as_on_a_gpu(call: TorchCall, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fused kernels take goes to them; what torch's kernels would serve goes to torch's function, as it came."""
    emulate(monkeypatch)
    inputs = make(call)
    with fastattn.use_backend("cudnn", "torch", "reference"):
        explained = drop_in.explain(inputs.q, inputs.k, inputs.v, inputs.mask, **inputs.options)
        assert explained.chosen == chosen.replace("slower", "torch")
        served, handed = Served(), Handed()
        for _ in range(2):
            found = inputs.call(SDPA)
        assert served() == ({"cudnn": 2} if chosen == "cudnn" else {})
        reason = decide.SLOWER if chosen == "slower" else decide.KERNELS
        assert handed() == ({} if chosen == "cudnn" else {reason: 2})
    assert_right(found, truth(inputs), call.dtype)
    if chosen != "cudnn":
        assert torch.equal(found, inputs.call(TORCHS))


def test_masks_with_grouped_heads_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no fused kernel for them there."""
    emulate(monkeypatch, (8, 0))
    inputs = make(TorchCall(dtype=BF16, k=(2, 2, 9, 8), enable_gqa=True, mask="bool:2,1,6,9"))
    with fastattn.use_backend("cudnn", "torch"):
        served = Served()
        assert_right(inputs.call(SDPA), truth(inputs), BF16)
        assert served() == {"cudnn": 1}


def traced_on_a_gpu(call: TorchCall, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Why a graph of such a call on a GPU holds torch's function."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_meta(*arguments: Any) -> Any:  # without CUDA fake tensors of a GPU cannot be sliced
        meta = [torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x for x in arguments]
        return translate(*meta)

    monkeypatch.setattr(torchs, "plain_tensors", lambda *tensors: True)
    monkeypatch.setattr(decide, "translate", on_meta)
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, dtype=call.dtype, device="cuda") for shape in (call.q, call.k, call.v or call.k))
        mask = None if call.mask is None else torch.empty(call.q[-2], call.k[-2], dtype=torch.bool, device="cuda")
        given = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False, **options}
        return decide.why_torch_when_traced(q, k, v, mask, **given)


@pytest.mark.parametrize(
    "call, options, why",
    [
        (TorchCall(dtype=BF16), {}, ""),
        (TorchCall(dtype=FP16), {"is_causal": True, "scale": 0.5}, ""),
        (TorchCall(dtype=BF16, mask="bool"), {}, decide.SLOWER),
        (TorchCall(dtype=BF16, mask="bool", k=(2, 2, 9, 8)), {"enable_gqa": True}, ""),
        (TorchCall(dtype=BF16, q=(6, 8), k=(9, 8)), {}, ""),
        (TorchCall(dtype=FP32), {}, decide.KERNELS),
        (TorchCall(dtype=BF16, q=(2, 4, 6, 512), k=(2, 4, 9, 512)), {}, decide.KERNELS),
        (TorchCall(dtype=BF16), {"dropout_p": 0.1}, decide.DROPOUT),
        (TorchCall(dtype=BF16), {"scale": torch.tensor(0.5)}, decide.TYPES),
        (
            TorchCall(dtype=BF16, mask="bool"),
            {"is_causal": True, "enable_gqa": True},
            "attn_mask together with is_causal",
        ),
    ],
    ids=str,
)
def test_graphs_on_a_gpu(call: TorchCall, options: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced_on_a_gpu(call, monkeypatch, **options) == why
    with sdpa_kernel(SDPBackend.MATH):
        assert traced_on_a_gpu(call, monkeypatch, **options) == decide.KERNELS
    with fastattn.use_backend("torch"):
        assert traced_on_a_gpu(call, monkeypatch, **options) == decide.KERNELS


def test_exported_programs_hold_torchs_function_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert traced_on_a_gpu(TorchCall(dtype=BF16), monkeypatch) == decide.KERNELS


def test_new_lengths_compile_nothing_that_torchs_function_would_not() -> None:
    counts = []
    for function in (TORCHS, SDPA):
        torch._dynamo.reset()
        graphs: list[Any] = []

        def backend(graph: Any, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(lambda q, f=function: f(q, q, q, is_causal=True), fullgraph=True, backend=backend)
        with fastattn.use_backend("reference"):
            for length in (4, 5, 6, 9, 17, 33, 100):
                compiled(torch.randn(1, 2, length, 8))
        counts.append(len(graphs))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mask", [None, "bool:2,1,1,70"])
def test_on_the_decode_kernel(mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, where it comes before torch's kernels and can serve the call."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    call = TorchCall(q=(2, 4, 1, 16), k=(2, 2, 70, 16), enable_gqa=True, mask=mask)
    inputs = make(call)
    served = Served()
    with torch.no_grad():
        found = inputs.call(SDPA)
    assert served() == {"decode": 1}
    assert_right(found, truth(inputs), FP32)
    with torch.enable_grad():
        assert inputs.fresh().call(SDPA).requires_grad  # with gradients by torch's kernels
    assert served() == {"decode": 1}


def test_costs_little_where_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No validation, no routing, no translation."""

    def never(*arguments: Any) -> Any:
        raise AssertionError("asked")

    for module, name in ((decide, "decision"), (decide, "translated"), (sdpa, "decision"), (registry, "backend")):
        monkeypatch.setattr(module, name, never)
    assert torch.equal(SDPA(Q, Q, Q), TORCHS(Q, Q, Q))
