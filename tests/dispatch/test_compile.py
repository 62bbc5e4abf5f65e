"""The op under torch.compile and export: one graph, eager's results and strides, no recompile for a new length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FP32, make
from features import FEATURES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import Intervals

attend = fastattn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No compiled code, and no count of recompiles, from other tests."""
    torch._dynamo.reset()


def _loss(options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = attend(q * 1.5, k, v, **options)
        out, *rest = found if isinstance(found, tuple) else (found,)
        return (out.transpose(1, 2).flatten(2) + 1, *rest)

    return forward


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "name",
    ["causal", "bool-b1qk", "intervals-bq", "sinks-window", "softcap", "scale", "lengths-causal", "layout-sliced"],
)
def test_compiled_is_eager(name: str, dynamic: bool) -> None:
    case = FEATURES[name].but(dtype=FP32, grads="qkv")
    inputs = make(case)
    clean = [x.requires_grad_() for x in inputs.clean]
    eager = _loss(inputs.options)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (eager, compiled):
        out = function(*clean)[0]
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad(out, clean, upstream)))
    for want, got in zip(*results):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_compiled_with_masks_and_log_sum_exp_made_inside() -> None:
    def forward(q: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        lo = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32)
        hi = torch.arange(1, q.shape[2] + 1, dtype=torch.int32).expand_as(lo)
        out, lse = attend(q, q, q, mask=Intervals(lo, hi), kv_lengths=lengths, return_lse=True, sinks=q[0, :, 0, 0])
        return out, lse

    q, lengths = torch.randn(2, 4, 6, 8, requires_grad=True), torch.tensor([6, 4], dtype=torch.int32)
    want = forward(q, lengths)
    got = torch.compile(forward, fullgraph=True, backend="aot_eager")(q, lengths)
    upstream = [torch.randn_like(x) for x in want]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, q, upstream), torch.autograd.grad(want, q, upstream))


def test_no_recompile_while_a_cache_grows() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v: attend(q, k, v, mask="causal"), fullgraph=True, backend=counter, dynamic=True)
    for length in (17, 18, 19, 40, 64, 301):
        q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
        torch.testing.assert_close(step(q, k, v), attend(q, k, v, mask="causal"))
    assert counter.frame_count == 1


def test_no_recompile_over_prompt_lengths_in_training() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q: attend(q, q, q, mask="causal"), fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 6, 33, 100):
        q = torch.randn(1, 2, length, 8, requires_grad=True)
        (got,) = torch.autograd.grad(step(q).sum(), q)
        (want,) = torch.autograd.grad(attend(q, q, q, mask="causal").sum(), q)
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_compiled_keeps_to_the_backends_of_its_trace() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    step = torch.compile(lambda q: attend(q, q, q), fullgraph=True, backend="aot_eager")
    with fastattn.use_backend("reference"):
        step(q)
    before = fastattn.stats()["calls"]
    step(q).sum().backward()
    after = fastattn.stats()["calls"]
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed == {"reference": 1, "reference.backward": 1}


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, mask="causal")

    args = tuple(torch.randn(2, 4, 9, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(Block(), args, dynamic_shapes=[{2: length}] * 3)
    other = tuple(torch.randn(2, 4, 31, 8) for _ in range(3))
    torch.testing.assert_close(program.module()(*other), attend(*other, mask="causal"))
