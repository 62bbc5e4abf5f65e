"""The forward and the backward of a call may be served by different backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import own_caches
from served import Served

import fastattn
from fastattn.backends.reference import ReferenceBackend
from fastattn.call import Call, Problem
from fastattn.dispatch import registry


class Half:
    """Serves one of the two as the reference does."""

    def __init__(self, name: str, backward: bool, gives_lse: bool = True, reads_lse: bool = True) -> None:
        self.name, self.backward = name, backward
        self.gives_lse, self.reads_lse = gives_lse, reads_lse
        self.told: list[Any] = []  #: log-sum-exps, and whether the backward was to be deterministic

    def reasons(self, problem: Problem) -> list[str]:
        return [] if problem.backward == self.backward else [f"has no {'forward' if self.backward else 'backward'}"]

    def bind(self, problem: Problem, call: Call) -> Any:
        kernel, half = ReferenceBackend().bind(problem, call), self

        class Kernel:
            def forward(self, call: Call) -> Any:
                out, lse = kernel.forward(call)
                return out, lse if half.gives_lse else None

            def backward(self, call: Call, out: Any, lse: Any, *grads: Any) -> Any:
                half.told.append((lse.clone(), problem.deterministic))
                return kernel.backward(call, out, lse, *grads)

        return Kernel()


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> dict[str, Half]:
    """decode has a forward, cudnn a backward."""
    found = {"decode": Half("decode", False), "cudnn": Half("cudnn", True)}
    others = registry.backend
    own_caches(monkeypatch)
    monkeypatch.setattr(registry, "backend", lambda name: found.get(name) or others(name))
    return found


def step(compiled: bool = False) -> tuple[Any, ...]:
    """A training step, and the same on the reference."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, n, 16, requires_grad=True) for n in (7, 9, 9)]
    upstream = torch.randn(2, 4, 7, 16)

    def run(**backend: Any) -> Any:
        out = fastattn.scaled_dot_product_attention(*inputs, mask="causal", **backend)
        return out, *torch.autograd.grad(out, inputs, upstream)

    return run(), run(backend="reference")


def test_each_by_its_own_backend(halves: dict[str, Half]) -> None:
    served = Served()
    with fastattn.use_backend("decode", "cudnn", "reference"):
        for _ in range(3):  # the second and third are bound
            found, want = step()
            for x, y in zip(found, want, strict=True):
                torch.testing.assert_close(x, y)
    counts = served()
    assert counts["decode"] == 3 and counts["cudnn.backward"] == 3
    assert all(lse.shape == (2, 4, 7) and lse.isfinite().all() for lse, _ in halves["cudnn"].told)


def test_explain_says_who_runs_the_backward(halves: dict[str, Half]) -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    with fastattn.use_backend("decode", "cudnn", "reference"):
        why = fastattn.explain(q, q, q)
        assert why.chosen == "decode" and why.backward is not None and why.backward.chosen == "cudnn"
        assert why.backward.reasons["decode"] == ["has no backward"]
        assert "backward:" in str(why) and "-> cudnn" in str(why).replace("->  ", "-> ")
        assert fastattn.explain(q.detach(), q.detach(), q.detach()).backward is None


def test_who_reads_the_log_sum_exp_does_not_follow_who_gives_none(halves: dict[str, Half]) -> None:
    halves["decode"].gives_lse = False
    served = Served()
    with fastattn.use_backend("decode", "cudnn", "reference"):
        found, want = step()
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)
    assert served()["decode"] == 1 and "cudnn.backward" not in served()
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    with fastattn.use_backend("decode", "cudnn"):  # nobody else has a backward
        assert fastattn.explain(q, q, q).chosen is None
        with pytest.raises(fastattn.BackendError, match="log-sum-exp that the backward needs"):
            fastattn.scaled_dot_product_attention(q, q, q)


def test_a_forward_that_nobody_goes_on_from_is_refused(halves: dict[str, Half]) -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    with fastattn.use_backend("decode"):
        with pytest.raises(fastattn.BackendError, match="decode: no allowed backend has its backward"):
            fastattn.scaled_dot_product_attention(q, q, q)
        fastattn.scaled_dot_product_attention(q.detach(), q.detach(), q.detach())


def test_deterministic_algorithms_have_routes_of_their_own(halves: dict[str, Half]) -> None:
    try:
        with fastattn.use_backend("decode", "cudnn", "reference"):
            for deterministic in (False, True, True, False):
                torch.use_deterministic_algorithms(deterministic)
                step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [deterministic for _, deterministic in halves["cudnn"].told] == [False, True, True, False]


def test_a_graph_goes_by_the_first_choice(halves: dict[str, Half]) -> None:
    """A compiled graph's operators choose when they run, each by itself."""
    halves["decode"].gives_lse = False
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (5, 6, 6))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return fastattn.scaled_dot_product_attention(q, k, v, mask="causal")

    with fastattn.use_backend("decode", "cudnn", "reference"):
        out = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
        got = torch.autograd.grad(out.sum(), (q, k, v))
    want = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    assert not halves["cudnn"].told, "it would have read what nobody gave"
