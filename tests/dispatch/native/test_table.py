"""The table of calls that the module serves: what is in it, when it is dropped, what it holds on to."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import native_emulation
import pytest
import torch
from native_emulation import Emulation
from served import Served
from torch import Tensor

import fastattn
from fastattn import debug, drop_in
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

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
