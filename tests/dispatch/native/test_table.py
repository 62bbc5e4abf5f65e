"""The table of calls that the module serves: what is in it, when it is dropped, what it holds on to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import native_emulation
import pytest
import torch
from native_emulation import Emulation
from served import Served
from threads import side_by_side
from torch import Tensor

import fastattn
from fastattn import debug, drop_in
from fastattn._compat import torch as torch_internals
from fastattn.dispatch import registry, routes
from fastattn.dispatch.native import calls
from fastattn.integrations.torch import decide
from fastattn.shape_cache import Reason, shape_cache

attend = fastattn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> Iterator[Emulation]:
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET", "FASTATTN_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(debug, "ENABLED", False)
    found = native_emulation.take(monkeypatch)
    yield found
    assert not found.errors


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, heads, 7, 8, requires_grad=grad) for heads in (4, 2, 2)]


def known(**options: Any) -> list[Tensor]:
    """Inputs of a call that is in the table."""
    inputs = qkv()
    for _ in range(2):
        attend(*inputs, **options)
    return inputs


def test_the_third_call_is_served(emulation: Emulation) -> None:
    inputs, served = qkv(), Served()
    want = attend(*inputs)
    for launches in (0, 1, 2):
        assert torch.equal(attend(*inputs), want)
        assert emulation.launches == launches
    assert served() == {"torch": 4}
    assert shape_cache.stats()["sections"]["native calls"]["entries"] == 1


@pytest.mark.parametrize("reason", Reason)
def test_what_drops_routes_drops_it(reason: Reason, emulation: Emulation) -> None:
    inputs = known()
    shape_cache.invalidate(reason)
    assert calls.module.size() == 0
    attend(*inputs)
    assert emulation.launches == 0


def test_a_graph_that_was_made_before_routes_were_dropped(emulation: Emulation) -> None:
    inputs = qkv(grad=True)
    for _ in range(4):
        out = attend(*inputs, backend="reference")
        want = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    before = emulation.launches
    again = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    assert emulation.launches == before + 1
    fastattn.clear_plans()
    found = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert emulation.launches == before + 1
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(want, again, found, strict=True))


def test_what_is_offered_while_routes_are_dropped_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv()
    attend(*inputs)
    generation = routes.generation
    monkeypatch.setattr(routes, "generation", lambda: generation() + 1)
    attend(*inputs)
    assert calls.module.size() == 0


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MOST", 3)
    for length in range(1, 9):
        for _ in range(2):
            attend(*[x[:, :, :length] for x in qkv()])
        assert calls.module.size() <= 3


def test_what_was_forgotten_for_want_of_room_comes_back(monkeypatch: pytest.MonkeyPatch, emulation: Emulation) -> None:
    monkeypatch.setattr(calls, "_MOST", 2)
    inputs = qkv()
    for _ in range(3 * calls._MOST_TIMES):
        for length in (3, 4):  # two other kinds: there is no room for a third
            for _ in range(2):
                attend(*[x[:, :, :length] for x in qkv()])
        attend(*inputs)
        attend(*inputs)
    before = emulation.launches
    for _ in range(3):
        attend(*inputs)
    assert emulation.launches > before


def test_many_scales_are_not_kept(emulation: Emulation) -> None:
    inputs = known()
    for i in range(100):
        attend(*inputs, scale=0.1 + i)
    assert calls.module.size() <= calls._MOST_OFFERS + 1
    assert torch.allclose(attend(*inputs, scale=0.5), attend(*inputs, scale=0.5, backend="reference"), atol=1e-6)


def test_one_kind_served_by_two_lists_of_backends(monkeypatch: pytest.MonkeyPatch, emulation: Emulation) -> None:
    inputs = known()
    served = Served()
    with fastattn.use_backend("reference"):
        for _ in range(4):
            attend(*inputs)
    assert served() == {"reference": 4}
    monkeypatch.setenv("FASTATTN_BACKENDS", "reference,torch")
    before = emulation.launches
    for _ in range(4):
        attend(*inputs)
    assert served() == {"reference": 8}
    assert emulation.launches == before + 2
    assert registry.allowed() is not registry.allowed()  # equal lists, which have to be known as one


def test_the_drop_in(monkeypatch: pytest.MonkeyPatch, emulation: Emulation) -> None:
    monkeypatch.setattr(decide, "at_once", lambda query: "")
    monkeypatch.setattr("fastattn.integrations.torch.sdpa.at_once", lambda query: "")
    inputs = qkv()
    want = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    with fastattn.use_backend("reference"):
        for _ in range(5):
            found = drop_in.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
            assert torch.allclose(found, want, atol=1e-6)
        assert emulation.launches >= 2
        before = emulation.launches
        with pytest.raises(RuntimeError):  # torch's own: heads that do not match
            drop_in.scaled_dot_product_attention(*inputs, is_causal=True)
        with pytest.raises(RuntimeError):
            drop_in.scaled_dot_product_attention(*inputs, torch.ones(7, 7, dtype=torch.bool), is_causal=True)
        drop_in.scaled_dot_product_attention(*inputs, is_causal=True, dropout_p=0.5, enable_gqa=True)
        assert emulation.launches == before


def test_nothing_outlives_its_call() -> None:
    inputs = qkv(grad=True)
    held: list[weakref.ref[Any]] = []
    for _ in range(5):
        out = attend(*inputs, backend="reference")
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        held = [weakref.ref(x) for x in (out, *grads, *inputs)]
    del out, grads, inputs
    gc.collect()
    assert [x for x in held if x() is not None] == []


def test_a_table_that_is_dropped_gives_back_all_it_has(emulation: Emulation) -> None:
    inputs = qkv(grad=True)
    for _ in range(4):
        attend(*inputs, backend="reference").sum().backward()
    assert emulation.programs == 2
    fastattn.clear_plans()
    gc.collect()
    assert emulation.programs == 0


def test_an_error_of_a_program_is_no_error_of_a_call(monkeypatch: pytest.MonkeyPatch, emulation: Emulation) -> None:
    from fastattn.backends import torch as torchs

    def broken(self: Any, call: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(torchs._TorchKernel, "program", broken)
    inputs = qkv()
    want = attend(*inputs)
    for _ in range(3):
        assert torch.equal(attend(*inputs), want)
    assert emulation.launches == 0 and calls.module.size() == 0


def test_threads() -> None:
    """Side by side, of one kind, with gradients: each gets its own results."""
    inputs = [qkv(grad=True) for _ in range(4)]
    wants = [torch.autograd.grad(attend(*x, backend="reference").square().sum(), x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            found = torch.autograd.grad(attend(*inputs[i], backend="reference").square().sum(), inputs[i])
            if not all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, wants[i], strict=True)):
                wrong.append(i)

    side_by_side(4, run)
    assert wrong == []


def test_only_names_are_backends(emulation: Emulation) -> None:
    inputs = qkv()
    with fastattn.use_backend("reference"):
        for _ in range(4):
            attend(*inputs)
    before, names = emulation.launches, len(calls._names)
    wrong: tuple[Any, ...] = (("reference",), (["reference"],), registry.NAMES, "nonsense", *map(str, range(50)))
    for backend in wrong:  # a tuple that is the list of allowed backends, too
        with pytest.raises(ValueError, match="backend"):
            attend(*inputs, backend=backend)
    assert emulation.launches == before and len(calls._names) == names


def test_routes_that_are_dropped_while_a_program_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import reference

    kernel: Any = reference._ReferenceKernel
    program = kernel.program

    def dropping(self: Any, call: Any) -> Any:
        shape_cache.invalidate(Reason.BACKEND_REFUSED)
        return program(self, call)

    monkeypatch.setattr(kernel, "program", dropping)
    inputs = qkv()
    for _ in range(2):
        attend(*inputs, backend="reference")
    assert calls.module.size() == 0


def test_a_call_without_memory_is_not_kept() -> None:
    """What stands for zeros has none."""
    zeros = torch._efficientzerotensor((2, 4, 7, 8))
    for _ in range(3):
        out = attend(zeros, *qkv()[1:], backend="reference")
    assert out.shape == (2, 4, 7, 8) and calls.module.size() == 0


class _Down(torch.autograd.Function):
    """Its gradient is what is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Any) -> Tensor:
        ctx.grad = grad
        return x.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        return ctx.grad(), None


@pytest.mark.parametrize("kind", ["sparse", "wrapped"])
def test_gradients_without_an_address_go_through_python(
    kind: str, monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    make = emulation.program

    def aligned(made: Any, given: dict[str, Tensor], run: Any) -> Any:
        program = make(made, given, run)
        program.aligned = set(given)
        return program

    monkeypatch.setattr(emulation, "program", aligned)
    inputs = qkv(grad=True)

    def gradients(grad: Any) -> Any:
        return torch.autograd.grad(_Down.apply(attend(*inputs, backend="reference"), grad), inputs)  # type: ignore[no-untyped-call]

    for _ in range(4):
        want = gradients(lambda: torch.ones(2, 4, 7, 8))
    before = emulation.launches
    if kind == "wrapped":
        found = gradients(lambda: TwoTensor(torch.ones(2, 4, 7, 8), torch.ones(2, 4, 7, 8)))
        assert all(torch.allclose(x.a, y, atol=1e-6) for x, y in zip(found, want, strict=True))
        # The subclass calls the operator for each of its parts: the first one in Python, the second one like it not.
        assert emulation.launches == before + 2
    else:
        with pytest.raises(NotImplementedError):  # as it is where Python serves the call
            gradients(lambda: torch.ones(2, 4, 7, 8).to_sparse())
        assert emulation.launches == before + 1  # of the forward


def test_a_launch_that_waits_does_not_stop_other_threads() -> None:
    """Where a GPU has enough to do a launch waits, and what the GPU waits for may be another thread's."""
    code = """
import ctypes, faulthandler, threading, time
import native_emulation, pytest, torch
import fastattn
from fastattn import Intervals, Segments
from fastattn.dispatch.native import calls

faulthandler.dump_traceback_later(60, exit=True)
with pytest.MonkeyPatch.context() as patch:
    native_emulation.take(patch)
    inputs = [torch.randn(2, heads, 7, 8) for heads in (4, 2, 2)]
    own = ctypes.CDLL(None)
    semaphore = ctypes.create_string_buffer(64)
    own.sem_init(semaphore, 0, 0)
    parts = native_emulation._Launch.parts.fget
    native_emulation._Launch.parts = property(lambda self: (ctypes.addressof(semaphore), *parts(self)[1:]))
    calls.module.setup(ctypes.cast(own.sem_wait, ctypes.c_void_p).value, 0, 0, 0, calls._gradients, Intervals, Segments)
    for _ in range(2):
        fastattn.scaled_dot_product_attention(*inputs, backend="reference")
    other = threading.Thread(target=lambda: (time.sleep(0.2), own.sem_post(semaphore)))
    other.start()
    fastattn.scaled_dot_product_attention(*inputs, backend="reference")
    other.join()
    assert calls.module.served() == {"reference": 1}
    print("served")
"""
    path = os.pathsep.join([str(Path(native_emulation.__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "served" in done.stdout, done.stderr


def test_no_memory_for_a_backward_leaves_all_of_it_to_python(
    monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    from fastattn.backends import reference

    kernel: Any = reference._ReferenceKernel
    program, backward = kernel.backward_program, kernel.backward

    def huge(self: Any, *arguments: Any) -> Any:
        found = program(self, *arguments)
        found.memory = 1 << 60
        return found

    monkeypatch.setattr(kernel, "backward_program", huge)
    inputs = qkv(grad=True)
    wants = []
    for _ in range(5):
        out = attend(*inputs, backend="reference")
        wants.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))
    assert all(torch.equal(x, y) for want in wants for x, y in zip(want, wants[0], strict=True))
    assert backward is kernel.backward and emulation.launches == 3  # of the forward


def test_compiled_autograd_knows_two_calls_apart() -> None:
    """Calls that differ in their scale alone, one after the other: what they share may lie where the last one's did."""
    from torch._dynamo import compiled_autograd

    inputs, grad_out = qkv(grad=True), torch.randn(2, 4, 7, 8)

    def gradients(scale: float) -> Any:
        fastattn.clear_plans()
        for _ in range(3):
            out = attend(*inputs, backend="reference", scale=scale)
        assert isinstance(out, Tensor) and out.grad_fn is not None and out.grad_fn.name() == "FastattnBackward"
        with compiled_autograd._enable(lambda graph: graph):
            return torch.autograd.grad(out, inputs, grad_out)

    for i in range(40):
        found = gradients(0.1 + 0.1 * i)
        q, k, v = inputs
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.1 + 0.1 * i, enable_gqa=True)
        want = torch.autograd.grad(out, inputs, grad_out)
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(found, want, strict=True))


def test_no_program_is_made_in_a_capture_or_for_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cleared in a capture is not cleared; it belongs to the graph."""
    capturing, device = False, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch_internals, "current_device", lambda: 1)
    monkeypatch.setattr(torch_internals, "raw_stream", lambda index: 7)
    assert calls._may_make(device) and calls._may_make(torch.device("cpu"))
    assert not calls._may_make(torch.device("cuda", 0))
    capturing = True
    assert not calls._may_make(device)


def test_what_may_not_be_made_now_is_made_later(monkeypatch: pytest.MonkeyPatch, emulation: Emulation) -> None:
    monkeypatch.setattr(calls, "_may_make", lambda device: False)
    inputs = qkv(grad=True)
    for _ in range(20):
        attend(*inputs, backend="reference").sum().backward()
    assert calls.module.size() == 0 and emulation.programs == 0
    monkeypatch.setattr(calls, "_may_make", lambda device: True)
    for _ in range(4):
        attend(*inputs, backend="reference").sum().backward()
    assert emulation.programs == 2
