"""The operators of compiled graphs, served by the module: what is launched and returned, and where Python serves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import native_emulation
import pytest
import torch
from hopper_launches import HopperGpu
from native_driver import NativeDriver
from native_emulation import Emulation
from native_launches import CASES, HKV, B, H, S, Symbols, both_ways, ints, made, results, tensors_of
from prepared import prepared
from served import Served
from threads import side_by_side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import debug
from fastattn.call import CALL, Call
from fastattn.dispatch import registry, routes
from fastattn.dispatch.native import calls, graphs
from fastattn.shape_cache import Reason, shape_cache

attend = fastattn.scaled_dot_product_attention
forward = torch.ops.fastattn.attention
backward = torch.ops.fastattn.attention_backward


def names() -> str:
    return ",".join(registry.allowed())


def of(call: Call) -> dict[str, Tensor]:
    return {name: x for name, x in zip(CALL.tensor_names, CALL.tensors(call), strict=True) if x is not None}


class TestLaunches:
    """They are what Python launches for the operator."""

    @pytest.mark.parametrize("grads", ["", "qkv"])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("name", CASES)
    def test_a_forward(self, name: str, dim: int, grads: str, gpu: HopperGpu, driver: NativeDriver) -> None:
        call = prepared(made(H, dim=dim), made(HKV, dim=dim), made(HKV, dim=dim), **CASES[name]())
        call = call._replace(grads=grads)
        python, native = both_ways(gpu, driver, lambda: forward(*call, names()), lambda: of(call))
        assert native == python

    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("name", CASES)
    def test_a_backward(self, name: str, dim: int, gpu: HopperGpu, driver: NativeDriver) -> None:
        call = prepared(made(H, dim=dim), made(HKV, dim=dim), made(HKV, dim=dim), **CASES[name]())
        call = call._replace(grads="qkv" if call.sinks is None else "qkvs")
        out, lse = forward(*call, names())
        upstream = {"grad_out": made(H, dim=dim), "out": out, "lse": lse}

        def run() -> Any:
            return backward(upstream["grad_out"], None, out, lse, *call, names())

        python, native = both_ways(gpu, driver, run, lambda: of(call) | upstream)
        assert native == python

    @pytest.mark.parametrize("keys", [40, 5000])
    @pytest.mark.parametrize("name", ["causal", "lengths", "sinks", "softcap", "intervals"])
    def test_decode(self, name: str, keys: int, gpu: HopperGpu, driver: NativeDriver) -> None:
        """Without numbers to count with, which would stay: a graph's memory is its own."""
        options = CASES[name]()
        options.pop("q_lengths", None)
        call = prepared(made(H, 1, 128), made(HKV, keys, 128), made(HKV, keys, 128), **options)
        python, native = both_ways(gpu, driver, lambda: forward(*call, names()), lambda: of(call))
        assert native == python and len(native) == 2

    def test_deterministic_algorithms_go_through_python(
        self, gpu: HopperGpu, driver: NativeDriver, request: pytest.FixtureRequest
    ) -> None:
        call = prepared(made(H), made(HKV), made(HKV))
        for _ in range(3):
            forward(*call, names())
        assert driver.launches == 2
        torch.use_deterministic_algorithms(True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
        forward(*call, names())
        assert driver.launches == 2

    def test_addresses_that_kernels_cannot_read_go_through_python(self, gpu: HopperGpu, driver: NativeDriver) -> None:
        memory = torch.randn(B * S * H * 64 + 1, dtype=torch.bfloat16)
        q, shifted = (memory[i:][: B * S * H * 64].view(B, S, H, 64).transpose(1, 2) for i in (0, 1))
        call = prepared(q, made(HKV), made(HKV))
        for _ in range(3):
            forward(*call, names())
        before = driver.launches
        forward(*call._replace(q=shifted), names())
        assert driver.launches == before > 0

    @pytest.mark.parametrize("moved", ["q", "k", "grad_out"])
    def test_a_first_call_that_kernels_cannot_read(self, moved: str, gpu: HopperGpu, driver: NativeDriver) -> None:
        """It makes no program: those after it are served, by the binaries that Python launches."""
        call = prepared(made(H), made(HKV), made(HKV), mask="causal", kv_lengths=ints(300, 11))._replace(grads="qkv")
        out, lse = forward(*call, names())
        given = of(call) | {"grad_out": made(H), "out": out, "lse": lse}

        def run(more: dict[str, Tensor]) -> Any:
            x = given | more
            upstream = x.pop("grad_out"), None, x.pop("out"), x.pop("lse")
            return backward(*upstream, *call._replace(**x), names())

        x = given[moved]
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype).as_strided(x.shape, x.stride(), 1)
        python, _ = both_ways(gpu, driver, lambda: run({}), lambda: given)
        fastattn.clear_plans()
        for _ in range(5):
            run({moved: shifted})
        run({})
        gpu.taken()
        before = driver.launches
        found = run({})
        native = Symbols(given | results(found)).of(gpu.taken())
        assert native == python and driver.launches == before + len(native)


class TestTable:
    """Over launches that compute what the reference does."""

    @pytest.fixture(autouse=True)
    def emulation(self, monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> Iterator[Emulation]:
        monkeypatch.setattr(debug, "ENABLED", False)
        found = native_emulation.take(monkeypatch)
        yield found
        assert not found.errors

    @staticmethod
    def call(**options: Any) -> Call:
        return prepared(*[torch.randn(2, heads, 7, 8) for heads in (4, 2, 2)], **options)

    @staticmethod
    def launched(emulation: Emulation, run: Callable[[], Any]) -> int:
        before = emulation.launches
        run()
        return emulation.launches - before

    def test_the_second_call_is_served(self, emulation: Emulation) -> None:
        call, served = self.call(), Served()
        want, empty = forward(*call, names())
        for launches in (1, 2):
            out, lse = forward(*call, names())
            assert torch.equal(out, want) and out.stride() == want.stride()
            assert lse.shape == empty.shape == (0,) and lse.dtype is torch.float32
            assert emulation.launches == launches
        assert served() == {"torch": 3}
        assert shape_cache.stats()["sections"]["native calls"]["entries"] == 1

    @pytest.mark.parametrize("return_lse", [False, True])
    @pytest.mark.parametrize("grads", ["", "k", "qkv"])
    def test_the_log_sum_exp(self, grads: str, return_lse: bool, emulation: Emulation) -> None:
        call = self.call(return_lse=return_lse)._replace(grads=grads)
        want = forward(*call, "reference")
        found = forward(*call, "reference")
        assert emulation.launches == 1
        assert [x.shape for x in found] == [x.shape for x in want]
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))

    @pytest.mark.parametrize(
        "change",
        [
            {"scale": 0.3}, {"left": 2}, {"right": 0}, {"softcap": 2.0}, {"return_lse": True}, {"grads": "v"},
            {"mask": torch.randn(1, 1, 7, 7)}, {"sinks": torch.randn(4)},
            {"lo": torch.zeros(1, 7, dtype=torch.int32), "hi": torch.full((1, 7), 5, dtype=torch.int32)},
            {"q_lengths": torch.tensor([3, 7], dtype=torch.int32)},
            {"kv_lengths": torch.tensor([3, 7], dtype=torch.int32)},
            {"v": torch.randn(2, 2, 7, 4)}, {"q": torch.randn(2, 7, 4, 8).transpose(1, 2)},
        ],
        ids=lambda x: ",".join(x),
    )  # fmt: skip
    def test_every_argument_is_in_the_key(self, change: dict[str, Any], emulation: Emulation) -> None:
        call = self.call()
        other = call._replace(**change)
        for _ in range(2):
            forward(*call, "reference")
        before = emulation.launches
        want = forward(*other, "reference")
        assert emulation.launches == before == 1
        found = forward(*other, "reference")
        assert emulation.launches == before + 1
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))

    def test_scales_that_never_come_back_fill_no_table(self, emulation: Emulation) -> None:
        """A graph may compute its scale anew for each call. (NaN is not even equal to itself.)"""
        call = self.call()
        for i in range(40):
            forward(*call._replace(scale=0.1 + i / 100), "reference")
            forward(*call._replace(scale=float("nan")), "reference")
        assert shape_cache.stats()["sections"]["native calls"]["entries"] == graphs._MOST_SCALES
        assert self.launched(emulation, lambda: forward(*call._replace(scale=0.1), "reference")) == 1

    def test_the_backends_are_in_the_key(self, emulation: Emulation) -> None:
        call = self.call()
        for _ in range(2):
            forward(*call, "reference")
        for others in ("torch", "torch,reference", "reference,torch"):
            assert self.launched(emulation, lambda: forward(*call, others)) == 0  # noqa: B023 (it is called here)

    @pytest.mark.parametrize("which", ["qkv", "k", "qkvms"])
    def test_gradients(self, which: str, emulation: Emulation) -> None:
        more = {"mask": torch.randn(2, 4, 7, 7), "sinks": torch.randn(4)} if "m" in which else {}
        call = self.call(**more)._replace(grads=which)
        out, lse = forward(*call, "reference")
        grad_out = torch.randn_like(out)
        want = backward(grad_out, None, out, lse, *call, "reference")
        before = emulation.launches
        for i in (1, 2):
            found = backward(grad_out, None, out, lse, *call, "reference")
            assert emulation.launches - before == i
            assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in want]
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        assert self.launched(emulation, lambda: backward(grad_out, lse, out, lse, *call, "reference")) == 0
        # Another layout of the gradient is another kind.
        other = grad_out.contiguous(memory_format=torch.channels_last)
        found = backward(other, None, out, lse, *call, "reference")
        assert emulation.launches - before == 2
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, want, strict=True))

    def test_gradients_without_elements_lie_as_pythons(self, emulation: Emulation) -> None:
        call = prepared(*[torch.randn(0, heads, 7, 8) for heads in (4, 2, 2)])._replace(grads="qkv")
        out, lse = forward(*call, "reference")
        want = backward(torch.randn_like(out), None, out, lse, *call, "reference")
        before = emulation.launches
        found = backward(torch.randn_like(out), None, out, lse, *call, "reference")
        assert emulation.launches == before + 1
        assert [(x.shape, x.stride()) for x in found] == [(x.shape, x.stride()) for x in want]

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_a_compiled_training_step(self, dynamic: bool, emulation: Emulation) -> None:
        torch._dynamo.reset()
        inputs = [torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2)]

        def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (attend(q * 2, k, v, mask="causal", backend="reference") + 1).sum()

        want = torch.autograd.grad(step(*inputs), inputs)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        found, launches = [], []
        for _ in range(4):
            before = emulation.launches
            found.append(torch.autograd.grad(compiled(*inputs), inputs))
            launches.append(emulation.launches - before)
        assert launches == [0, 2, 2, 2]
        for gradients in found:
            assert all(torch.equal(x, y) for x, y in zip(gradients, want, strict=True))

    def test_leaves_have_their_gradients_outside_of_graphs_too(self, emulation: Emulation) -> None:
        """There the forward is Python's, which links it; the operator of the backward is served."""
        call = self.call()
        leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
        call = call._replace(grads="qkv")
        want = None
        for i in range(3):
            out, _ = forward(*call, "reference")
            assert out.requires_grad
            before = emulation.launches
            found = torch.autograd.grad(out.sum(), leaves)
            assert emulation.launches - before == min(i, 1)
            want = found if want is None else want
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        with torch.no_grad():
            assert self.launched(emulation, lambda: forward(*call, "reference")) == 1

    @pytest.mark.parametrize("reason", Reason)
    def test_what_drops_routes_drops_it(self, reason: Reason, emulation: Emulation) -> None:
        call = self.call()
        for _ in range(2):
            forward(*call, names())
        shape_cache.invalidate(reason)
        assert calls.module.size() == 0
        assert self.launched(emulation, lambda: forward(*call, names())) == 0
        assert self.launched(emulation, lambda: forward(*call, names())) == 1

    def test_routes_that_are_dropped_while_it_is_offered(
        self, emulation: Emulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = calls.packed

        def dropped(*arguments: Any) -> Any:
            shape_cache.invalidate(Reason.BACKEND_REFUSED)
            return packed(*arguments)

        monkeypatch.setattr(calls, "packed", dropped)
        call = self.call()
        for _ in range(2):
            forward(*call, names())
            assert calls.module.size() == 0
        assert emulation.launches == 0

    def test_a_route_for_now_is_not_kept(self, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes.Route, "lasts", property(lambda self: False))
        call = self.call()
        for _ in range(3):
            forward(*call, names())
        assert emulation.launches == 0 and calls.module.size() == 0

    def test_there_is_a_bound(self, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls, "_MOST", 3)
        q, k, v = [torch.randn(2, heads, 9, 8) for heads in (4, 2, 2)]
        for length in (3, 4, 5, 6, 7):
            call = prepared(q[:, :, :length], k, v)
            for _ in range(2):
                forward(*call, "reference")
            assert calls.module.size() <= 3
        call = prepared(q[:, :, :3], k, v)  # which was forgotten, and may be offered again
        assert self.launched(emulation, lambda: forward(*call, "reference")) == 0
        assert self.launched(emulation, lambda: forward(*call, "reference")) == 1

    def test_a_kind_without_a_program_is_not_asked_for_ever(
        self, emulation: Emulation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(graphs, "_program", lambda *x: asked.append(x))
        call = self.call()
        for _ in range(5):
            forward(*call, names())
        assert len(asked) == 1

    def test_a_launch_that_fails_is_pythons(self, emulation: Emulation) -> None:
        call = self.call()
        want = forward(*call, "reference")[0]
        emulation.fails = True
        assert torch.equal(forward(*call, "reference")[0], want)
        assert emulation.launches == 0

    def test_modes_see_the_operator(self, emulation: Emulation) -> None:
        seen = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        call = self.call()
        want = forward(*call, "reference")[0]
        forward(*call, "reference")
        with Mode():
            found = forward(*call, "reference")[0]
        assert seen == [torch.ops.fastattn.attention.default] and torch.equal(found, want)

    def test_fakes_and_tracers(self, emulation: Emulation) -> None:
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        call = self.call()
        for _ in range(2):
            forward(*call, "reference")
        before = emulation.launches
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in (call.q, call.k, call.v)]
            found = forward(*fakes, *call[3:], "reference")
        assert isinstance(found[0], FakeTensor) and found[0].shape == call.q.shape
        graph = make_fx(lambda *x: forward(*x, *call[3:], "reference")[0], tracing_mode="fake")(*call[:3])
        assert torch.ops.fastattn.attention.default in [x.target for x in graph.graph.nodes]
        assert emulation.launches == before

    @pytest.mark.parametrize("inference", [False, True])
    def test_inference_tensors(self, inference: bool, emulation: Emulation) -> None:
        with torch.inference_mode(inference):
            call = self.call()
            want = forward(*call, "reference")[0]
            found = forward(*call, "reference")[0]
        assert emulation.launches == 1 and torch.equal(found, want) and found.is_inference() == inference

    def test_threads(self, emulation: Emulation) -> None:
        call = self.call()
        want = forward(*call, "reference")[0]

        def use(i: int) -> None:
            for n in range(50):
                if i == 0 and n % 10 == 0:
                    shape_cache.invalidate(Reason.BACKEND_REFUSED)
                assert torch.equal(forward(*call, "reference")[0], want)

        side_by_side(3, use)

    def test_a_forked_child_waits_for_no_thread_of_its_parent(self, emulation: Emulation) -> None:
        """While it is forked another thread has the program that the child's calls would run."""
        call, leaves = self.call(), [torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2)]
        for _ in range(3):
            want = forward(*call, "reference")[0]
            linked: Any = attend(*leaves)
        begun, go_on = threading.Event(), threading.Event()

        def held() -> None:
            begun.set()
            go_on.wait(30)

        emulation.before = held
        thread = threading.Thread(target=forward, args=(*call, "reference"))
        thread.start()
        assert begun.wait(30)
        child = os.fork()
        if not child:
            signal.alarm(30)  # ends a child that waits for ever
            emulation.before = None
            right = torch.equal(forward(*call, "reference")[0], want)
            right &= all(bool(x.any()) for x in torch.autograd.grad(linked, leaves, torch.ones_like(want)))
            os._exit(0 if right and not emulation.errors else 1)
        go_on.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0
        emulation.before = None
        assert self.launched(emulation, lambda: forward(*call, "reference")) == 1  # the parent's

    def test_opcheck(self, emulation: Emulation) -> None:
        """Torch's own tests of an operator: schema, fake, autograd's registration, AOT dispatch."""
        call = self.call()
        call.q.requires_grad_()
        for _ in range(3):
            torch.library.opcheck(torch.ops.fastattn.attention.default, (*call._replace(grads="q"), "reference"))


def test_a_call_that_returns_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """Outside of graphs: it is served unless it has gradients, where the log-sum-exp may have one too."""
    emulation = native_emulation.take(monkeypatch)
    inputs = [torch.randn(2, heads, 7, 8) for heads in (4, 2, 2)]
    want = attend(*inputs, return_lse=True)
    for i in range(3):
        found = attend(*inputs, return_lse=True)
        assert isinstance(found, tuple) and all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        assert emulation.launches == i
    before = emulation.launches
    assert isinstance(attend(*inputs), Tensor)  # another kind
    leaves = [x.clone().requires_grad_() for x in inputs]
    for _ in range(4):
        out, lse = attend(*leaves, return_lse=True)
        gradients = torch.autograd.grad((out.sum() + lse.sum()), leaves)
    assert emulation.launches == before and all(x.any() for x in gradients)
    with torch.no_grad():
        for _ in range(3):
            assert not attend(*leaves, return_lse=True)[1].requires_grad
    assert emulation.launches > before and not emulation.errors
    assert tensors_of({"lse": want[1]})["lse 0"].shape == (2, 4, 7)
