"""Packed sequences against attention computed for each of them by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import naive
import pytest
import torch
from cases import BF16, FP32, FP64, TOLERANCE, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import debug, varlen_attention
from fastattn._compat import torch as torch_internals

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6

PACKS = {
    "several": ([3, 5, 1, 4], [3, 5, 1, 4]),
    "one": ([7], [7]),
    "other-keys": ([3, 2, 4], [6, 2, 9]),
    "fewer-keys": ([5, 3], [2, 3]),  # causal: the first rows see nothing
    "empty-sequences": ([0, 3, 0, 0, 2, 0], [0, 3, 2, 0, 4, 5]),
    "queries-without-keys": ([2, 3], [0, 3]),
    "all-empty": ([0, 0], [0, 0]),
    "none": ([], []),
}


def cumulative(lengths: list[int], start: int = 0) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=start)), dtype=torch.int32)


def inputs(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        torch.randn(queries, HEADS, DIM).to(dtype).requires_grad_(),
        torch.randn(keys, KV_HEADS, DIM).to(dtype).requires_grad_(),
        torch.randn(keys, KV_HEADS, VALUE_DIM).to(dtype).requires_grad_(),
    )


def one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Each sequence by itself through the naive implementation; tokens of no sequence give 0."""
    out, lse = torch.zeros(len(q), HEADS, VALUE_DIM).double(), torch.full((HEADS, len(q)), -torch.inf).double()
    if options.get("sinks") is not None:
        lse = options["sinks"].double()[:, None].expand(HEADS, len(q)).clone()
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_kv[n], cu_kv[n + 1])
        found = naive.attention(*(x[i].transpose(0, 1)[None] for x, i in ((q, rows), (k, keys), (v, keys))), **options)
        out[rows], lse[:, rows] = found.out[0].transpose(0, 1), found.lse[0]
    return out, lse


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (2, 1)}, {"window": (1, -1), "causal": True}, {"sinks": 1}, {"softcap": 2.0},
     {"scale": 0.2, "causal": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pack", PACKS)
def test_each_sequence_by_itself(pack: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    lengths, kv_lengths = PACKS[pack]
    cu_q, cu_kv = cumulative(lengths), cumulative(kv_lengths)
    # Two tokens more than the sequences have: they belong to nobody.
    leaves = inputs(sum(lengths) + 2, sum(kv_lengths) + 2, dtype)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(HEADS)
    out, lse = varlen_attention(*leaves, cu_q, cu_kv, **options, return_lse=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    mask = "causal" if options.pop("causal", False) else None
    want_out, want_lse = one_by_one(*wide, cu_q, cu_kv, mask=mask, **options)
    assert out.is_contiguous()
    assert out.dtype == dtype
    forward, backward = TOLERANCE[dtype]
    assert relative_error(out, want_out) < forward
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    finite = want_lse != -torch.inf
    torch.testing.assert_close(lse.double()[finite], want_lse[finite], rtol=1e-5, atol=1e-5)
    if not sum(lengths) * sum(kv_lengths):
        return  # nothing of the naive result depends on the inputs
    upstream = torch.randn_like(want_out)
    got = torch.autograd.grad(out, leaves, upstream.to(dtype))
    want = torch.autograd.grad(want_out, wide, upstream.to(dtype).double())
    for g, w in zip(got, want):  # twice: rounding errors of so few numbers do not average out
        assert relative_error(g, w, floor=w.numel() ** 0.5 / 10) < 2 * backward


def test_plain_output_without_the_log_sum_exp() -> None:
    q, k, v = inputs(6, 6, FP32)
    cu = cumulative([2, 4])
    out = varlen_attention(q, k, v, cu, cu)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(
        out.double(), one_by_one(q.double(), k.double(), v.double(), cu, cu)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_foreign_tokens_may_hold_anything(backend: str) -> None:
    """NaN in one sequence stays there; NaN in tokens of no sequence goes nowhere."""
    cu = cumulative([3, 4], start=2)
    q, k, v = (x.detach() for x in inputs(12, 12, FP32))
    want = varlen_attention(q, k, v, cu, cu, causal=True, backend=backend)
    for x in (q, k, v):
        x[:2] = x[9:] = torch.nan
    got = varlen_attention(q, k, v, cu, cu, causal=True, backend=backend)
    torch.testing.assert_close(got, want)
    assert not got[:2].any()
    assert not got[9:].any()


def test_a_strided_pack() -> None:
    """A fused QKV projection [T, 3, H, D]."""
    qkv = torch.randn(9, 3, HEADS, DIM)
    cu = cumulative([4, 5])
    got = varlen_attention(*qkv.unbind(1), cu, cu, causal=True)
    want = varlen_attention(*(x.contiguous() for x in qkv.unbind(1)), cu, cu, causal=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "name, value",
    [
        ("q", torch.randn(1, 6, HEADS, DIM)), ("q", None), ("q", torch.ones(6, HEADS, DIM).int()),
        ("k", torch.randn(6, DIM)), ("k", torch.randn(6, KV_HEADS, DIM + 1)),
        ("v", torch.randn(5, KV_HEADS, VALUE_DIM)), ("v", "v"), ("v", torch.randn(6, 1, VALUE_DIM)),
        ("cu_seqlens_q", [0, 2, 6]), ("cu_seqlens_q", torch.tensor([0, 2, 6])),
        ("cu_seqlens_q", cumulative([2, 4])[None]),
        ("cu_seqlens_q", torch.zeros(0, dtype=torch.int32)), ("cu_seqlens_q", cumulative([2, 4]).to("meta")),
        ("cu_seqlens_kv", cumulative([6])), ("cu_seqlens_kv", torch.tensor([0.0, 2.0, 6.0])), ("cu_seqlens_kv", None),
        ("window", (1,)), ("window", (-2, 0)), ("scale", "1"), ("softcap", -1.0), ("sinks", torch.zeros(KV_HEADS)),
        ("backend", "flash"),
    ],
)  # fmt: skip
def test_bad_argument(name: str, value: Any) -> None:
    q, k, v = inputs(6, 6, FP32)
    cu = cumulative([2, 4])
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_kv": cu} | {name: value}
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*expected"):
        varlen_attention(**arguments)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextmanager
def debug_on() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(debug, "ENABLED", True)
        yield


@contextmanager
def without_private_views() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_internals, "strided_view", torch_internals._strided_view)
        yield


WATCHED = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "debug": debug_on,
    "private": without_private_views,
    "mode": Watching,
}


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("pack", PACKS)
def test_without_gradients(pack: str, watched: str) -> None:
    """Where nothing is recorded views are made another way; twice, for the second call of a kind takes another one."""
    lengths, kv_lengths = PACKS[pack]
    cu_q, cu_kv = cumulative(lengths), cumulative(kv_lengths)
    same = cu_q if lengths == kv_lengths else cu_kv
    q, k, v = (x.detach() for x in inputs(sum(lengths) + 2, sum(kv_lengths) + 2, FP32))
    strided = torch.stack([q, q], 1)[:, 1], torch.stack([k, k], 2)[:, :, 0], v
    want_out, want_lse = one_by_one(q.double(), k.double(), v.double(), cu_q, cu_kv, mask="causal")
    for _ in range(2):
        for tensors, cu in (((q, k, v), same), (strided, same), ((q, k, v), cu_kv)):
            with WATCHED[watched]():
                out, lse = varlen_attention(*tensors, cu_q, cu, causal=True, return_lse=True)
            assert out.is_contiguous() and out.shape == (*q.shape[:2], VALUE_DIM) and not out.requires_grad
            torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_lengths_that_change(apart: bool) -> None:
    """The same tensors of cumulative lengths, filled anew: before another call, and between forward and backward."""
    leaves = inputs(9, 9, FP32)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    cu = cumulative([4, 5])
    other = cu.clone() if apart else cu
    upstream = torch.randn(9, HEADS, VALUE_DIM)
    for lengths in ([4, 5], [1, 8], [0, 3]):
        with torch.no_grad():
            for x in {id(x): x for x in (cu, other)}.values():
                x.copy_(cumulative(lengths))
            plain = varlen_attention(*leaves, cu, other)
        out = varlen_attention(*leaves, cu, other)
        want, _ = one_by_one(*wide, cu, cu)
        for x in (plain, out):
            torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=1e-5)
        cu.fill_(0)
        other.fill_(0)
        got = torch.autograd.grad(out, leaves, upstream)
        for g, w in zip(got, torch.autograd.grad(want, wide, upstream.double()), strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_strided_and_shifted_lengths() -> None:
    q, k, v = (x.detach() for x in inputs(9, 9, FP32))
    cu = cumulative([4, 5])
    want = varlen_attention(q, k, v, cu, cu)
    for other in (cu.repeat_interleave(2)[::2], torch.cat([cu.new_tensor([77]), cu])[1:]):
        assert torch.equal(varlen_attention(q, k, v, other, other), want)
        assert torch.equal(varlen_attention(q, k, v, other, cu), want)
    with pytest.raises(ValueError, match="causal: expected True or False"):
        varlen_attention(q, k, v, cu, cu, causal=1)  # type: ignore[arg-type]


def test_tensors_without_data() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(9, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        cu = torch.empty(4, dtype=torch.int32)
        assert varlen_attention(q, k, v, cu, cu, causal=True).shape == q.shape
    q, k, v, cu = (x.to("meta") for x in (*inputs(9, 9, FP32), cumulative([4, 5])))
    assert varlen_attention(q, k, v, cu, cu).shape == (9, HEADS, VALUE_DIM)


def test_lengths_that_vary_in_a_graph() -> None:
    """One graph for every number of sequences and tokens."""
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        out = varlen_attention(q, k, v, cu, cu, causal=True)
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=True)
    for lengths in ([4, 5], [2, 3, 7, 1], [5, 0, 6]):
        q, k, v = (x.detach() for x in inputs(sum(lengths), sum(lengths), FP32))
        cu = cumulative(lengths)
        want, _ = one_by_one(q.double(), k.double(), v.double(), cu, cu, mask="causal")
        torch.testing.assert_close(compiled(q, k, v, cu).double(), want, rtol=1e-5, atol=1e-5)
    assert graphs == 1


@pytest.mark.parametrize(
    "lengths, message",
    [([0, 4, 10], r"stop in 0\.\.9, got 4\.\.10"), ([0, 5, 3, 9], r"without overlap, got \[5, 3\) of row 0 before")],
)
def test_lengths_are_looked_at_on_demand(lengths: list[int], message: str) -> None:
    """With FASTATTN_DEBUG=1, though the table says nothing of batch entries."""
    q, k, v = (x.detach() for x in inputs(9, 9, FP32))
    good, bad = cumulative([4, 5]), torch.tensor(lengths, dtype=torch.int32)
    with debug_on():
        for other in (good, good.clone()):
            varlen_attention(q, k, v, good, other)
        for other in (bad, bad.clone()):
            with pytest.raises(ValueError, match=f"^mask.table: expected .*{message}"):
                varlen_attention(q, k, v, bad, other)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_of_the_sinks_alone(backend: str | None) -> None:
    q, k, v = (x.detach() for x in inputs(9, 9, FP32))
    cu, sinks, upstream = cumulative([4, 5]), torch.randn(HEADS, requires_grad=True), torch.randn(9, HEADS, VALUE_DIM)
    wide = sinks.detach().double().requires_grad_()
    want, _ = one_by_one(q.double(), k.double(), v.double(), cu, cu, sinks=wide)
    (expected,) = torch.autograd.grad(want, wide, upstream.double())
    for _ in range(2):
        out = varlen_attention(q, k, v, cu, cu, sinks=sinks, backend=backend)
        (found,) = torch.autograd.grad(out, sinks, upstream)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(varlen_attention(q, k, v, cu, cu, sinks=sinks, backend=backend), out)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_has_no_constants() -> None:
    q, k, v = (x.detach() for x in inputs(9, 9, FP32))
    cu = cumulative([4, 5])
    traced = torch.jit.trace(lambda *x: varlen_attention(*x, x[-1], causal=True), (q, k, v, cu), check_trace=False)
    others, cu = [torch.randn_like(x) for x in (q, k, v)], cumulative([2, 7])
    want, _ = one_by_one(*(x.double() for x in others), cu, cu, mask="causal")
    torch.testing.assert_close(traced(*others, cu).double(), want, rtol=1e-5, atol=1e-5)
