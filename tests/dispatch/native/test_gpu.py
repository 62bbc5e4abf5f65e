"""The native module over real kernels: what Python gives for the same call is the truth, bit for bit in the forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_driver import compiled
from prepared import prepared
from threads import side_by_side
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments, drop_in
from fastattn.dispatch import registry
from fastattn.dispatch.native import calls

pytestmark = pytest.mark.gpu

attend = fastattn.scaled_dot_product_attention
B, H, HKV, S = 2, 8, 2, 300


@pytest.fixture(autouse=True)
def module(fresh_caches: None) -> Iterator[Any]:
    if calls.module is None:
        calls._take(compiled())
    found = calls.module
    found.clear()
    yield found
    found.clear()
    calls.module = None  # other tests are not for it


def made(heads: int, length: int = S, dim: int = 128) -> Tensor:
    return torch.randn(B, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"mask": "causal"},
    "full": dict,
    "window": lambda: {"mask": "causal", "window": (100, -1)},
    "softcap": lambda: {"mask": "causal", "softcap": 30.0},
    "sinks": lambda: {"mask": "causal", "sinks": torch.randn(H, device="cuda")},
    "lengths": lambda: {"mask": "causal", "q_lengths": ints(7, S), "kv_lengths": ints(S, 11)},
    "intervals": lambda: {"mask": Intervals(ints(0, 3)[:, None], ints(200, S)[:, None])},
    "segments": lambda: {"mask": Segments(ints(0, 0, 9, 0, 9, 200, 1, 3, S).view(3, 3).T.contiguous(), True)},
    "bool": lambda: {"mask": torch.rand(1, 1, S, S, device="cuda") > 0.3},
    "keys": lambda: {"mask": torch.rand(B, 1, 1, S, device="cuda") > 0.3},
    "bias": lambda: {"mask": normal(1, H, S, S)},
}


def served(module: Any, run: Callable[[], Any], kinds: int) -> Any:
    """What a call gives that the module serves; kinds: 1 for a forward, 2 with its backward."""
    for _ in range(4):
        run()
    before = module.served()
    found = run()
    after = module.served()
    assert sum(after.values()) - sum(before.values()) == kinds, (before, after)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_forward(name: str, module: Any) -> None:
    options, inputs = OPTIONS[name](), [made(H), made(HKV), made(HKV)]
    want = attend(*inputs, **options)
    for _ in range(2):
        attend(*[torch.full_like(x, torch.nan) for x in inputs], **options)  # what the next outputs' memory holds
    assert torch.equal(served(module, lambda: attend(*inputs, **options), 1), want)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_backward(name: str, module: Any) -> None:
    options, leaves = OPTIONS[name](), [made(heads).requires_grad_() for heads in (H, HKV, HKV)]
    leaves += [options["sinks"].requires_grad_()] if "sinks" in options else []
    grad_out = made(H)

    def run() -> Any:
        return torch.autograd.grad(attend(*leaves[:3], **options), leaves, grad_out)

    want = run()
    for x, y in zip(served(module, run, 2), want, strict=True):
        assert ((x - y).float().norm() / y.float().norm()).item() < 4e-3


@pytest.mark.parametrize("keys", [100, 1500, 9000])
@pytest.mark.parametrize("side", [False, True])
def test_decode_on_the_default_stream_and_on_another(keys: int, side: bool, module: Any) -> None:
    inputs = made(H, 1), made(HKV, keys), made(HKV, keys)
    want = attend(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream if side else torch.cuda.current_stream()):
        found = served(module, lambda: attend(*inputs), 1)
        torch.cuda.synchronize()
    assert torch.equal(found, want)
    assert torch.equal(attend(*inputs), want)


def test_a_capture_between_calls(module: Any) -> None:
    """Counters that a captured graph would clear when it is replayed are not for calls outside of it."""
    inputs = made(H, 1), made(HKV, 1500), made(HKV, 1500)
    want = attend(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*inputs)
    for _ in range(4):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, want)
        assert torch.equal(attend(*inputs), want)
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        captured = attend(*inputs)
    captured.fill_(torch.nan)
    again.replay()
    assert torch.equal(captured, want)


def test_the_drop_in(module: Any) -> None:
    inputs = [made(H, 2048), made(HKV, 2048), made(HKV, 2048)]
    want = drop_in.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def run() -> Tensor:
        return drop_in.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    assert torch.equal(served(module, run, 1), want)


def test_threads_train_side_by_side(module: Any) -> None:
    inputs = [[made(heads).requires_grad_() for heads in (H, HKV, HKV)] for _ in range(4)]

    def step(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves, mask="causal").float().square().sum(), leaves)

    wants, wrong = [step(x) for x in inputs], []

    def run(i: int) -> None:
        for _ in range(30):
            for x, y in zip(step(inputs[i]), wants[i], strict=True):
                if not ((x - y).float().norm() / y.float().norm()).item() < 4e-3:
                    wrong.append(i)

    side_by_side(4, run)
    assert wrong == []


class TestGraphs:
    """The operators, as graphs of torch.compile call them."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch._dynamo.reset()

    @pytest.mark.parametrize("grads", ["", "qkv"])
    @pytest.mark.parametrize("name", OPTIONS)
    def test_a_forward(self, name: str, grads: str, module: Any) -> None:
        call = prepared(made(H), made(HKV), made(HKV), **OPTIONS[name]())._replace(grads=grads)
        run = lambda: torch.ops.fastattn.attention(*call, ",".join(registry.allowed()))  # noqa: E731
        want = run()
        found = served(module, run, 1)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))

    @pytest.mark.parametrize("name", OPTIONS)
    def test_a_backward(self, name: str, module: Any) -> None:
        call = prepared(made(H), made(HKV), made(HKV), **OPTIONS[name]())
        call = call._replace(grads="qkv" if call.sinks is None else "qkvs")
        names, grad_out = ",".join(registry.allowed()), made(H)
        out, lse = torch.ops.fastattn.attention(*call, names)
        run = lambda: torch.ops.fastattn.attention_backward(grad_out, None, out, lse, *call, names)  # noqa: E731
        want = run()
        for x, y in zip(served(module, run, 1), want, strict=True):
            assert x.shape == y.shape
            if not x.numel():
                continue
            assert ((x - y).float().norm() / y.float().norm()).item() < 4e-3

    @pytest.mark.parametrize("length", [1, S])
    @pytest.mark.parametrize("mode", [None, "reduce-overhead"])
    def test_inference(self, mode: str | None, length: int, module: Any) -> None:
        """One query goes to the decode kernel; with graphs of CUDA, whose memory is theirs."""
        q, k, v = made(H, length), made(HKV), made(HKV)

        @torch.no_grad()
        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q * 2, k, v, mask="causal") + 1  # type: ignore[operator]

        want, compiled_step = step(q, k, v), torch.compile(step, fullgraph=True, mode=mode)
        for i in range(8):
            found = compiled_step(q if i % 2 else q.clone(), k, v).clone()
            torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
            attend(q, k, v, mask="causal")  # on counters of its own
        if mode is None:
            before = module.served()
            compiled_step(q, k, v)
            assert sum(module.served().values()) == sum(before.values()) + 1

    def test_a_training_step(self, module: Any) -> None:
        leaves = [made(heads).requires_grad_() for heads in (H, HKV, HKV)]
        grad_out = made(H)

        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q * 1, k, v, mask="causal")  # type: ignore[return-value]

        def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), leaves, grad_out)

        want, compiled_step = gradients(step), torch.compile(step, fullgraph=True)
        for x, y in zip(served(module, lambda: gradients(compiled_step), 2), want, strict=True):
            assert ((x - y).float().norm() / y.float().norm()).item() < 4e-3


def test_a_log_sum_exp(module: Any) -> None:
    inputs = made(H), made(HKV), made(HKV)
    want = attend(*inputs, mask="causal", return_lse=True)
    found = served(module, lambda: attend(*inputs, mask="causal", return_lse=True), 1)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
