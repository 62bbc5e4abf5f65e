"""Every strategy on two and four processes against plain attention in one: outputs, log-sum-exp, gradients."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import naive
import pytest
import torch
from cases import relative_error
from ranks import Ranks
from torch import Tensor

import fastattn
from fastattn.parallel import ContextParallel

STRATEGIES = ("ulysses", "ring", "allgather")


@dataclass(frozen=True)
class Case:
    """One call, everything that a process needs to know of it."""

    name: str
    length: int
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    batch: int = 2
    causal: bool = True
    window: tuple[int, int] | None = None
    sinks: bool = False
    softcap: float | None = None
    segments: tuple[tuple[int, int, int], ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    orders: tuple[str, ...] = ("head-tail",)
    lse_gradient: bool = False
    options: dict[str, Any] = field(default_factory=dict)


PACKED = (0, 5, 6, 21, 21, 33)
ROWS = ((0, 3, 20), (0, 20, 33), (1, 0, 7), (1, 9, 30))
CASES = [
    Case("causal", 32, orders=("head-tail", "contiguous"), lse_gradient=True),
    Case("full", 32, causal=False, orders=("head-tail", "contiguous")),
    Case("uneven", 37, orders=("head-tail", "contiguous")),
    Case("uneven full", 35, causal=False, dims=(8, 4)),
    Case("fewer tokens than chunks", 3, sinks=True),
    Case("window", 41, window=(5, -1), orders=("head-tail", "contiguous")),
    Case("wide window", 41, window=(17, 0), sinks=True, orders=("head-tail", "contiguous")),
    Case("window to both sides", 41, causal=False, window=(6, 3)),
    Case("sinks", 33, sinks=True, lse_gradient=True),
    Case("softcap", 33, softcap=1.5),
    Case("multi-head", 32, heads=(4, 4)),
    Case("one K/V head", 32, heads=(4, 1), sinks=True),
    Case("packed", 33, batch=1, cu_seqlens=PACKED, sinks=True, orders=("head-tail", "contiguous")),
    Case("packed full", 33, batch=1, causal=False, cu_seqlens=PACKED),
    Case("packed window", 33, batch=1, cu_seqlens=PACKED, window=(4, -1)),
    Case("rows of segments", 33, segments=ROWS, sinks=True),
    Case("rows of segments full", 33, causal=False, segments=ROWS),
    Case("rows of segments window", 33, segments=ROWS, window=(4, -1)),
    Case("float32", 64, dtype=torch.float32),
    Case("everything", 45, sinks=True, softcap=2.0, window=(9, -1), options={"scale": 0.2}),
]


def inputs(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The same on every rank: the call's tensors, and the gradients of output and log-sum-exp."""
    g = torch.Generator().manual_seed(len(case.name) * 1000 + case.length)
    (hq, hkv), (d, dv) = case.heads, case.dims
    shapes = {"q": (hq, d), "k": (hkv, d), "v": (hkv, dv)}
    found = {
        n: torch.randn(case.batch, h, case.length, e, generator=g, dtype=case.dtype) for n, (h, e) in shapes.items()
    }
    if case.sinks:
        found["sinks"] = torch.randn(hq, generator=g, dtype=case.dtype)
    do = torch.randn(case.batch, hq, case.length, dv, generator=g, dtype=case.dtype)
    return found, do, torch.randn(case.batch, hq, case.length, generator=g, dtype=case.dtype)


def seen(case: Case) -> Tensor:
    """Who sees whom, written down plainly: bool `[B, 1, S, S]`."""
    i, j = torch.arange(case.length)[:, None], torch.arange(case.length)[None]
    left, right = case.window or (-1, -1)
    mask = torch.ones(case.batch, 1, case.length, case.length, dtype=torch.bool)
    if case.causal:
        mask &= j <= i
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    table = case.segments
    if case.cu_seqlens is not None:
        table = tuple((0, a, b) for a, b in pairwise(case.cu_seqlens))
    if table is not None:
        same = torch.zeros_like(mask)
        for row, a, b in table:
            same[row, :, a:b, a:b] = True
        mask &= same
    return mask


def reference_results(case: Case) -> dict[str, Tensor]:
    tensors, do, dlse = inputs(case)
    leaves = {n: x.double().requires_grad_() for n, x in tensors.items()}
    sinks = leaves.get("sinks")
    q, k, v = (leaves[n] for n in "qkv")
    found = naive.attention(q, k, v, mask=seen(case), sinks=sinks, softcap=case.softcap, **case.options)
    grads = [do.double()]
    outs = [found.out]
    if case.lse_gradient:
        outs, grads = [found.out, found.lse], [*grads, dlse.double()]
    d = torch.autograd.grad(outs, list(leaves.values()), grads)
    return {"out": found.out.detach(), "lse": found.lse.detach(), **{f"d{n}": x for n, x in zip(leaves, d)}}


def on_a_rank(case: Case, strategy: str, order: str) -> dict[str, Tensor]:
    """The same over ranks: what is whole is gathered, what is a share is left one."""
    cp = ContextParallel(strategy=strategy, order=order)
    tensors, do, dlse = inputs(case)
    leaves = {n: (x if n == "sinks" else cp.shard(x, 2)).requires_grad_() for n, x in tensors.items()}
    do, dlse = cp.shard(do, 2), cp.shard(dlse, 2)
    mask: Any = "causal" if case.causal else None
    if case.segments is not None:
        mask = fastattn.Segments(torch.tensor(case.segments, dtype=torch.int32).T.contiguous(), case.causal)
    out, lse = cp.attention(
        *(leaves[n] for n in "qkv"), length=case.length, mask=mask, window=case.window, sinks=leaves.get("sinks"),
        softcap=case.softcap, cu_seqlens=case.cu_seqlens, return_lse=True, **case.options,
    )  # fmt: skip
    outs, grads = ([out, lse], [do, dlse]) if case.lse_gradient else ([out], [do])
    d = torch.autograd.grad(outs, list(leaves.values()), grads)
    found = {"out": out.detach(), "lse": lse.detach(), **{f"d{n}": x for n, x in zip(leaves, d)}}
    return {n: x if n == "dsinks" else cp.unshard(x, 2, case.length) for n, x in found.items()}


def compare(case: Case, answers: list[dict[str, Tensor]]) -> None:
    want = reference_results(case)
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    for rank, found in enumerate(answers):
        if "dsinks" in found:
            found["dsinks"] = sum(answer["dsinks"] for answer in answers) if rank == 0 else answers[0]["dsinks"]
        for name, x in want.items():
            got = found[name].double()
            finite = torch.isfinite(x)
            assert torch.equal(got[~finite], x[~finite]), f"{name} of rank {rank}"
            assert relative_error(got[finite], x[finite]) < tolerance, f"{name} of rank {rank}"


ALL = [(case, strategy, order) for case in CASES for strategy in STRATEGIES for order in case.orders]


@pytest.mark.parametrize("case, strategy, order", ALL, ids=[f"{c.name}-{s}-{o}" for c, s, o in ALL])
def test_two_ranks_are_as_one(case: Case, strategy: str, order: str, two: Ranks) -> None:
    compare(case, two.run(on_a_rank, case, strategy, order))


def spread(case: Case, strategy: str) -> bool:
    return strategy != "ulysses" or case.heads[1] in (1, 2, 4)


FOUR = [(case, strategy, order) for case, strategy, order in ALL if spread(case, strategy)]


@pytest.mark.parametrize("case, strategy, order", FOUR, ids=[f"{c.name}-{s}-{o}" for c, s, o in FOUR])
def test_four_ranks_are_as_one(case: Case, strategy: str, order: str, four: Ranks) -> None:
    compare(case, four.run(on_a_rank, case, strategy, order))


def drawn(seed: int) -> Case:
    """A call at random. (Random segments leave gaps, are empty, or reach over all chunks.)"""
    r = random.Random(seed)
    length, batch, causal = r.randint(1, 70), r.choice([1, 2]), r.random() < 0.7
    window = None
    if r.random() < 0.4:
        window = (r.choice([-1, 0, 3, 11, 40]), r.choice([-1, 0, 5]))
    segments = None
    if r.random() < 0.5:
        found = []
        for row in range(batch):
            cuts = sorted(r.randint(0, length) for _ in range(2 * r.randint(1, 3)))
            found += [(row, a, b) for a, b in zip(cuts[::2], cuts[1::2])]
        segments = tuple(found)
    return Case(
        f"drawn {seed}", length, heads=r.choice([(4, 4), (4, 2), (4, 1), (8, 4)]), dims=r.choice([(8, 8), (4, 12)]),
        batch=batch, causal=causal, window=window, sinks=r.random() < 0.4, softcap=r.choice([None, None, 1.0]),
        segments=segments, orders=(r.choice(["head-tail", "contiguous"]),),
    )  # fmt: skip


def many_on_a_rank(cases: list[Case], strategy: str) -> list[dict[str, Tensor]]:
    return [on_a_rank(case, strategy, case.orders[0]) for case in cases]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_at_random(strategy: str, seed: int, four: Ranks) -> None:
    cases = [drawn(seed + i) for i in range(25)]
    answers = four.run(many_on_a_rank, cases, strategy)
    for case, *found in zip(cases, *answers):
        try:
            compare(case, found)
        except AssertionError as error:
            error.add_note(str(case))
            raise


def twice() -> list[str]:
    said = []
    for strategy in STRATEGIES:
        x = torch.randn(1, 4, 8, 8, requires_grad=True)
        out = ContextParallel(strategy=strategy).attention(x, x, x, length=16, mask="causal")
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        try:
            torch.autograd.grad(first.sum(), x)
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_a_second_derivative_is_refused(two: Ranks) -> None:
    for said in two.run(twice):
        assert len(said) == len(STRATEGIES)
