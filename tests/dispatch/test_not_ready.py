"""A backend whose kernel is still being compiled is passed over, without a wait and a warning, until it is there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, assert_right, make, reference_results
from cases import run as run_case
from served import Served
from stand_in_backend import StandIn, stand_in_binaries
from stand_in_compiler import Flags

import fastattn
from fastattn.backends.base import NotReady
from fastattn.backends.reference import ReferenceBackend
from fastattn.backends.torch import TorchBackend
from fastattn.backends.triton.binaries import store
from fastattn.backends.triton.binaries.store import TRIES, Binaries
from fastattn.call import Call, Problem
from fastattn.dispatch import fast_path, refusals, routes

pytestmark = pytest.mark.usefixtures("fresh_caches", "fresh_warnings")

CASE = Case(dtype=torch.float32, q_len=9, kv_len=9, mask="causal")


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """The compiler goes on when this file is there."""
    return tmp_path / "go"


@pytest.fixture(autouse=True)
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Binaries]:
    found = stand_in_binaries(tmp_path, monkeypatch)
    yield found
    found.compilers.stop()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, go: Path) -> StandIn:
    return StandIn(Flags(f"until {go}")).installed(monkeypatch)


def served(inputs: Any, backend: str | None = None, case: Case = CASE) -> dict[str, int]:
    """Who serves a call, which has to be right and without a warning."""
    count = Served()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastattn.FastattnWarning)
        results = run_case(inputs, backend, poison=False)
    assert_right(case, inputs, results, reference_results(inputs))
    return {name: number for name, number in count().items() if not name.endswith(".backward")}


def explained(inputs: Any) -> tuple[str | None, str]:
    found = fastattn.explain(inputs.q, inputs.k, inputs.v, mask="causal")
    return found.chosen, "; ".join(found.reasons["decode"])


def test_another_backend_serves_until_it_is_there(backend: StandIn, binaries: Binaries, go: Path) -> None:
    inputs = make(CASE)
    assert explained(inputs) == (
        "torch",
        "its kernel is compiled after the first such call, which another backend serves",
    )
    start = time.monotonic()
    for _ in range(3):
        assert served(inputs) == {"torch": 1}
    assert time.monotonic() - start < 5.0
    chosen, why = explained(inputs)
    assert chosen == "torch" and why.startswith("its kernel is being compiled")
    assert backend.bound == 0 and len(fast_path._cached) == 0
    go.touch()
    assert binaries.wait(20.0)
    for _ in range(3):
        assert served(inputs) == {"decode": 1}
    assert explained(inputs) == ("decode", "")
    assert backend.bound == 1 and len(fast_path._cached) == 1
    assert fastattn.stats()["binaries"]["background_compiles"] == 1


def test_it_may_notice_only_when_it_is_called(backend: StandIn, binaries: Binaries, go: Path) -> None:
    backend.late = True
    inputs = make(CASE)
    for _ in range(2):
        assert served(inputs) == {"torch": 1}
    go.touch()
    assert binaries.wait(20.0)
    assert served(inputs) == {"decode": 1}


def test_other_kinds_of_calls_wait_for_the_same_binary(backend: StandIn, binaries: Binaries, go: Path) -> None:
    every = {case: make(case) for case in (CASE.but(q_len=n, kv_len=n) for n in (3, 4, 5))}
    for case, inputs in every.items():
        assert served(inputs, case=case) == {"torch": 1}
    go.touch()
    assert binaries.wait(20.0)
    for case, inputs in every.items():
        assert served(inputs, case=case) == {"decode": 1}
    assert binaries.stats()["background_compiles"] == 1


@pytest.mark.parametrize("moment", ["before it is recorded", "while another one is bound"])
def test_it_comes_while_the_call_is_routed(
    backend: StandIn, binaries: Binaries, go: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The route that passes it over must not outlive that."""

    def come() -> None:
        go.touch()
        assert binaries.wait(20.0)

    def bind_torch(self: Any, problem: Problem, call: Call) -> Any:
        come()
        return ReferenceBackend().bind(problem, call)

    def bind(problem: Problem, call: Call) -> Any:
        try:
            return StandIn.bind(backend, problem, call)
        except NotReady:
            come()
            raise

    if moment == "before it is recorded":
        monkeypatch.setattr(backend, "bind", bind)
    else:
        monkeypatch.setattr(TorchBackend, "bind", bind_torch)
    inputs = make(CASE)
    served(inputs)
    assert served(inputs) == {"decode": 1}
    assert len(refusals._waiting) == 0 and all(not route.coming for route in routes._routes.values())


def test_a_call_that_nobody_else_may_serve_waits(backend: StandIn, binaries: Binaries) -> None:
    backend.flags = Flags("slow 0.3")
    inputs = make(CASE)
    assert served(inputs, "decode") == {"decode": 1}
    assert binaries.stats()["compiles"] + binaries.stats()["background_compiles"] == 1


def test_a_call_that_is_to_wait_does_though_others_did_not(
    backend: StandIn, binaries: Binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a capture after calls that warmed up: the route that passes the backend over must not be taken."""
    backend.flags = Flags("slow 0.5")
    inputs = make(CASE)
    assert served(inputs) == {"torch": 1}
    monkeypatch.setenv("FASTATTN_COMPILE", "wait")
    assert explained(inputs) == ("decode", "")
    assert served(inputs) == {"decode": 1} and binaries.stats()["binaries"] == 1


def test_nobody_else_and_no_compiler(backend: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_COMPILE", "off")
    inputs = make(CASE)
    with pytest.raises(fastattn.BackendError, match="decode: its kernel is not compiled: FASTATTN_COMPILE=off"):
        served(inputs, "decode")
    for _ in range(2):
        assert served(inputs) == {"torch": 1}
    assert len(fast_path._cached) == 1  # nothing is to come: the route lasts
    assert explained(inputs) == ("torch", "its kernel is not compiled: FASTATTN_COMPILE=off")


def test_a_call_that_waited_in_vain(backend: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend serves it, where one may."""
    backend.flags = Flags("crash")
    monkeypatch.setenv("FASTATTN_COMPILE", "wait")
    inputs = make(CASE)
    with pytest.warns(fastattn.FastattnWarning, match="decode could not serve a call .*the compiler's process ended"):
        run_case(inputs, poison=False)
    assert served(inputs) == {"torch": 1}
    fastattn.clear_plans()
    with pytest.raises(fastattn.BackendError, match=r"decode: .*the compiler's process ended with status -9"):
        run_case(inputs, "decode", poison=False)


def test_what_cannot_be_compiled_is_refused_with_a_warning(backend: StandIn, binaries: Binaries) -> None:
    backend.flags = Flags("wrong")
    inputs = make(CASE)
    assert served(inputs) == {"torch": 1}
    assert binaries.wait(20.0)
    with pytest.warns(fastattn.FastattnWarning, match="decode refused .*does not like it"):
        run_case(inputs, poison=False)
    assert served(inputs) == {"torch": 1}
    assert "does not like it" in explained(inputs)[1]


def test_what_could_not_be_compiled_for_now_is_tried_again(
    backend: StandIn, binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    for module in (store, refusals, routes):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr(binaries, "_clock", clock.monotonic)
    backend.flags = Flags(f"once {tmp_path / 'crashed'}")
    inputs = make(CASE)
    assert served(inputs) == {"torch": 1}
    assert binaries.wait(20.0)
    for _ in range(2):
        assert served(inputs) == {"torch": 1}
    assert "will be tried again: the compiler's process ended" in explained(inputs)[1]
    clock.now += store.FIRST_RETRY + 1
    assert served(inputs) == {"torch": 1}  # it is asked for
    assert binaries.wait(20.0) and TRIES > 1
    assert served(inputs) == {"decode": 1}


def test_a_backward_that_is_ready_before_its_forward_was(backend: StandIn, binaries: Binaries, go: Path) -> None:
    """It reads the log-sum-exp, which torch's forward leaves out for itself."""
    case = CASE.but(grads="qkv")
    inputs = make(case)
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    count = Served()
    out = fastattn.scaled_dot_product_attention(q, k, v, mask="causal")
    assert count() == {"torch": 1}
    go.touch()
    assert binaries.wait(20.0)
    torch.autograd.backward(out, inputs.grad_out)
    found = {"out": out.detach(), **{f"d{name}": x.grad for name, x in zip("qkv", (q, k, v), strict=True)}}
    assert_right(case, inputs, found)
    expected = fastattn.scaled_dot_product_attention(q, k, v, mask="causal", return_lse=True, backend="reference")[1]
    for lse in backend.told:
        torch.testing.assert_close(lse, expected.detach())
    assert fastattn.explain(inputs.q, inputs.k, inputs.v, mask="causal").chosen == "decode"
