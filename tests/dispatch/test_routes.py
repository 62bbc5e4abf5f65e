"""Which backend serves a call, how that is said, and what is remembered and counted."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from cases import FP32, make
from features import FEATURES
from prepared import prepared
from served import Served

import fastattn
from fastattn.call import Problem
from fastattn.common import notice
from fastattn.dispatch import registry, routes

NAMES = registry.NAMES


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, fresh_caches: None, fresh_warnings: None) -> None:
    """No settings of the machine's, no counts and warnings of other tests."""
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@dataclasses.dataclass
class Fake:
    """A backend that gives its reasons and computes nothing."""

    name: str
    why: list[str] = dataclasses.field(default_factory=list)

    def reasons(self, problem: Problem) -> list[str]:
        return self.why


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Fake]]:
    """Replaces the backends by fakes with the given refusals: fakes(torch=["too tired"])."""

    def replace(**refusals: list[str]) -> dict[str, Fake]:
        found = {name: Fake(name, refusals.get(name, [])) for name in NAMES}
        monkeypatch.setattr(registry, "backend", found.__getitem__)
        return found

    return replace


def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)


def problem(device: str = "cuda", **arguments: Any) -> Problem:
    return dataclasses.replace(Problem.of(prepared(*qkv(), **arguments)), device=device)


def test_the_first_without_a_reason_serves(fakes: Any) -> None:
    fakes(decode=["too many queries"], hopper=["another GPU"])
    assert routes.select(problem(), NAMES).name == "cudnn"
    assert routes.select(problem(), ("torch", "cudnn")).name == "torch"
    assert list(routes.reasons(problem()).items()) == [
        ("decode", ["too many queries"]),
        ("hopper", ["another GPU"]),
        *((name, []) for name in ("cudnn", "torch", "prefill", "reference")),
    ]


def test_backend_error_lists_every_refusal(fakes: Any) -> None:
    fakes(decode=["too many queries"], cudnn=["no GPU", "softcap"], torch=["softcap"])
    with pytest.raises(fastattn.BackendError) as error:
        routes.select(problem(), ("decode", "cudnn", "torch"))
    assert str(error.value).splitlines()[1:] == [
        "  decode: too many queries",
        "  cudnn: no GPU; softcap",
        "  torch: softcap",
    ]
    assert isinstance(error.value, ValueError)


def test_a_refused_call_raises_before_anything_is_launched() -> None:
    served = Served()
    with pytest.raises(fastattn.BackendError, match=r"torch: .*softcap"):
        fastattn.scaled_dot_product_attention(*qkv(), softcap=1.0, backend="torch")
    assert served() == {}


def test_explain_is_a_table(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(decode=["too many queries", "gradients"], hopper=["another GPU"])
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    explanation = fastattn.explain(*qkv(), mask="causal")
    assert str(explanation).splitlines() == [
        "   decode     too many queries; gradients",
        "   hopper     another GPU",
        "-> torch      serves this call",
        "   prefill    could serve it, comes later in the list",
        "   reference  could serve it, comes later in the list",
        "   cudnn      not allowed here (use_backend, backend=, FASTATTN_BACKENDS or FASTATTN_CUDNN)",
    ]
    assert explanation.chosen == "torch"
    assert explanation.reasons["decode"] == ["too many queries", "gradients"]
    assert explanation.problem.causal


def test_explain_when_nobody_can(fakes: Any) -> None:
    fakes(torch=["tired"])
    explanation = fastattn.explain(*qkv(), backend="torch")
    assert explanation.chosen is None
    assert "->" not in str(explanation)
    assert re.search(r"^ +torch +tired$", str(explanation), re.M)


def test_explain_computes_nothing() -> None:
    served = Served()
    fastattn.explain(*qkv())
    assert served() == {}


def test_explain_tells_about_gradients() -> None:
    """The mask's gradient is what torch's kernels lack: with no_grad they can serve."""
    mask = torch.zeros(3, 5, requires_grad=True)
    assert fastattn.explain(*qkv(), mask=mask).chosen == "reference"
    with torch.no_grad():
        assert fastattn.explain(*qkv(), mask=mask).chosen == "torch"


def test_cudnn_switched_off_is_not_even_asked(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fakes(decode=["no"], hopper=["no"])
    monkeypatch.setenv("FASTATTN_CUDNN", "0")
    monkeypatch.setattr(found["cudnn"], "reasons", lambda problem: pytest.fail("asked"), raising=False)
    assert routes.select(problem(), registry.allowed()).name == "torch"


def test_warns_once_for_each_reason(fakes: Any) -> None:
    found = fakes(decode=["a"], hopper=["a"], cudnn=["b"], torch=["softcap"], prefill=["c"])
    with pytest.warns(
        fastattn.FastattnWarning,
        match=r"reference.*decode: a; hopper: a; cudnn: b; torch: softcap; prefill: c.*fastattn doctor",
    ):
        assert routes.select(problem(), NAMES).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            routes.select(problem(scale=0.5), NAMES)  # the same reasons, another call
    found["torch"].why = ["sinks"]
    with pytest.warns(fastattn.FastattnWarning, match="torch: sinks"):
        routes.select(problem(), NAMES)


def test_warns_once_from_many_threads(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(decode=["a"], hopper=["a"], cudnn=["b"], torch=["c"], prefill=["d"])
    said: list[str] = []
    monkeypatch.setattr(notice.warnings, "warn", lambda text, *_, **__: said.append(text))
    cuda = problem()
    threads = [threading.Thread(target=routes.select, args=(cuda, NAMES)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1


@pytest.mark.parametrize("quiet", ["on the CPU", "nothing to compute", "served by another"])
def test_does_not_warn(quiet: str, fakes: Any) -> None:
    fakes(decode=["a"], cudnn=["b"], torch=[] if quiet == "served by another" else ["c"])
    p = problem("cpu" if quiet == "on the CPU" else "cuda")
    if quiet == "nothing to compute":
        p = dataclasses.replace(p, kv_len=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routes.select(p, NAMES)


def test_stats_count_forward_and_backward() -> None:
    served = Served()
    q, k, v = qkv()
    q.requires_grad_()
    for _ in range(2):
        fastattn.scaled_dot_product_attention(q, k, v, backend="torch").sum().backward()
    fastattn.scaled_dot_product_attention(q, k, v, softcap=1.0)
    assert served() == {"torch": 2, "torch.backward": 2, "reference": 1}


def test_stats_are_a_copy() -> None:
    served = Served()
    fastattn.scaled_dot_product_attention(*qkv(), backend="torch")
    fastattn.stats()["calls"]["torch"] = 99
    assert served() == {"torch": 1}


def test_the_backward_keeps_to_the_backends_of_the_forward() -> None:
    served = Served()
    q, k, v = qkv()
    q.requires_grad_()
    with fastattn.use_backend("reference"):
        out = fastattn.scaled_dot_product_attention(q, k, v)
    with fastattn.use_backend("torch"):
        out.sum().backward()
    assert served() == {"reference": 1, "reference.backward": 1}


def test_routes_are_remembered_for_the_right_problem() -> None:
    """Whatever tells two problems apart must be in what a remembered route is found by."""
    calls = []
    for case in FEATURES.values():
        for changed in (case, case.but(dtype=FP32), case.but(return_lse=True), case.but(grads="q")):
            inputs = make(changed)
            calls.append(prepared(inputs.q, inputs.k, inputs.v, **inputs.options))
    for _ in range(2):
        for call in calls:
            for names in (NAMES, ("reference",)):
                found, backend = routes.route(call, names)[:2]
                assert found == Problem.of(call)
                assert backend.name == routes.select(found, names).name
        calls.reverse()


def test_a_problem_says_nothing_about_data() -> None:
    """Strides, scale and lengths are no part of it: two calls that differ in them are the same problem."""
    q, k, v = qkv()
    lengths = torch.tensor([3], dtype=torch.int32)
    a = Problem.of(prepared(q, k, v, scale=0.3, kv_lengths=lengths))
    b = Problem.of(prepared(q.mT.contiguous().mT, k, v, scale=0.7, kv_lengths=lengths + 1))
    assert a == b
    assert hash(a) == hash(b)


def test_a_problem_knows_whether_shapes_leave_a_row_without_keys() -> None:
    """Backends skip the care for such rows when it says no."""
    for q_len, kv_len, left, right in itertools.product((1, 2, 4), (0, 1, 3, 4), (-1, 0, 2), (-1, 0, 1, 3)):
        q, k = torch.zeros(1, 1, q_len, 2), torch.zeros(1, 1, kv_len, 2)
        seen = naive.visible(q, k, window=(left, right))
        found = Problem.of(prepared(q, k, k, window=(left, right)))
        assert found.may_have_empty_rows == bool((~seen.any(-1)).any()), found
