"""Packs drawn at random: `varlen_attention` on every backend that accepts one, against the reference with a mask."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import naive
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, TOLERANCE, lse_error, relative_error
from drawn_checks import EXAMPLES, hold
from hypothesis import strategies as st
from torch import Tensor

import fastattn

HEADS, KV_HEADS, DIM = 4, 2, 8
SHARE = 20  #: of so many problems one is a pack


@dataclass(frozen=True)
class Pack:
    """Sequences of queries and of keys that lie end to end."""

    q_lens: tuple[int, ...] = (3, 5)
    kv_lens: tuple[int, ...] = (3, 5)
    tail: int = 0  #: tokens behind the last sequence, of queries and of keys
    one_tensor: bool = False  #: the same cumulative lengths, and the same object, for both
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sinks: torch.dtype | None = None
    dtype: torch.dtype = FP32
    head_major: bool = False
    return_lse: bool = False
    grads: str = ""
    seed: int = 0


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    count = draw(st.integers(0, 6))
    size = st.integers(0, 12) | st.integers(0, 70)
    q_lens = draw(st.tuples(*[size] * count))
    alike = draw(st.booleans())
    side = st.integers(-1, 20)
    return Pack(
        q_lens=q_lens,
        kv_lens=q_lens if alike else draw(st.tuples(*[size] * count)),
        tail=draw(st.sampled_from([0, 0, 1, 9])),
        one_tensor=alike and draw(st.booleans()),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        sinks=draw(st.sampled_from([None, None, FP32, BF16])),
        dtype=draw(st.sampled_from([BF16, FP16, FP32, FP64])),
        head_major=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        grads="".join(sorted(draw(st.sets(st.sampled_from("qkv"))))),
        seed=draw(st.integers(0, 2**31)),
    )


def seen_in(pack: Pack) -> Tensor:
    """Which keys each query sees: bool `[Tq, Tkv]`, from the lengths alone."""
    seen = torch.zeros(sum(pack.q_lens) + pack.tail, sum(pack.kv_lens) + pack.tail, dtype=torch.bool)
    left, right = pack.window or (-1, -1)
    starts = zip(itertools.accumulate(pack.q_lens, initial=0), itertools.accumulate(pack.kv_lens, initial=0))
    for (q_start, kv_start), rows, keys in zip(starts, pack.q_lens, pack.kv_lens):
        for i in range(rows):
            position = i + keys - rows
            first = 0 if left < 0 else max(0, position - left)
            last = keys if right < 0 else min(keys, position + right + 1)
            last = min(last, position + 1) if pack.causal else last
            seen[q_start + i, kv_start + first : kv_start + max(first, last)] = True
    return seen


def wrong(pack: Pack, backend: str, device: str) -> list[str]:
    """What a backend gets wrong; nothing when it refuses."""
    p, generator = pack, torch.Generator().manual_seed(pack.seed)
    seen = seen_in(p)

    def tensor(tokens: int, heads: int) -> Tensor:
        x = torch.randn(tokens, heads, DIM, generator=generator).to(p.dtype)
        return x.transpose(0, 1).contiguous().transpose(0, 1) if p.head_major else x

    q, k, v = (
        tensor(*shape) for shape in ((seen.shape[0], HEADS), (seen.shape[1], KV_HEADS), (seen.shape[1], KV_HEADS))
    )
    sinks = None if p.sinks is None else torch.randn(HEADS, generator=generator).to(p.sinks)
    upstream = torch.randn(q.shape, generator=generator).to(p.dtype)
    clean = [x.double().requires_grad_(name in p.grads) for name, x in zip("qkv", (q, k, v))]
    # What the band alone hides is no such thing (`cases.make`): kernels read whole blocks at its edge.
    within = seen_in(dataclasses.replace(p, causal=False, window=None))
    hidden_keys, hidden_rows = ~within.any(0), ~within.any(1)
    q, k, v = (
        x.masked_fill(hidden[:, None, None], math.nan).to(device)
        for x, hidden in ((q, hidden_rows), (k, hidden_keys), (v, hidden_keys))
    )
    leaves = [x.requires_grad_() for name, x in zip("qkv", (q, k, v)) if name in p.grads]
    cu_q, cu_kv = (
        torch.tensor([*itertools.accumulate(n, initial=0)], dtype=torch.int32, device=device)
        for n in (p.q_lens, p.kv_lens)
    )
    try:
        found = fastattn.varlen_attention(
            q, k, v, cu_q, cu_q if p.one_tensor else cu_kv,
            causal=p.causal, window=p.window, softcap=p.softcap, sinks=None if sinks is None else sinks.to(device),
            return_lse=p.return_lse, backend=backend,
        )  # fmt: skip
    except fastattn.BackendError:
        assert backend != "reference"
        return []
    out, lse = found if isinstance(found, tuple) else (found, None)
    batched = [x.transpose(0, 1)[None] for x in clean]
    want = naive.attention(*batched, mask=seen, softcap=p.softcap, sinks=None if sinks is None else sinks.double())
    want_out = want.out[0].transpose(0, 1)
    shares: dict[str, Any] = {"out": relative_error(out.cpu(), want_out, _floor(seen)) / TOLERANCE[p.dtype][0]}
    assert out.is_contiguous() and out.dtype == p.dtype
    if lse is not None:
        shares["lse"] = lse_error(lse.cpu(), want.lse[0]) / min(TOLERANCE[p.dtype][0], 1e-3)
    if leaves:
        got = torch.autograd.grad(out, leaves, upstream.to(device))
        exact = torch.autograd.grad(want_out, [x for x in clean if x.requires_grad], upstream.double())
        for name, x, y in zip(p.grads, got, exact):
            shares[f"d{name}"] = relative_error(x.cpu(), y, _floor(seen)) / TOLERANCE[p.dtype][1]
    allowance = 1 if p.dtype in (FP32, FP64) else 4
    return [] if max(shares.values()) <= allowance else [f"{backend}: shares of the accepted error: {shares}"]


def _floor(seen: Tensor) -> float:
    """Half the norm of a result in which nothing cancels (`cases._floor`)."""
    n = seen.sum(-1).double()
    return 0.5 * math.sqrt(HEADS * DIM * float((1 / n[n > 0]).sum()))


KEPT = (
    Pack(q_lens=(0, 3, 0), kv_lens=(2, 3, 0), tail=1, causal=True, grads="qkv"),
    Pack(q_lens=(), kv_lens=(), tail=1),
    Pack(q_lens=(5,), kv_lens=(2,), causal=True, return_lse=True, dtype=FP64, grads="qkv"),
)


@pytest.mark.slow
def test_packs(seed: int) -> None:
    def check(drawn: Pack) -> None:
        found = [text for backend in ("torch", "reference") for text in wrong(drawn, backend, "cpu")]
        assert not found, found

    hold(packs(), check, EXAMPLES // SHARE, seed, KEPT)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fastattn.FastattnWarning")
def test_packs_on_a_gpu(seed: int) -> None:
    def check(drawn: Pack) -> None:
        found = [
            text for backend in ("cudnn", "decode", "torch", "reference") for text in wrong(drawn, backend, "cuda")
        ]
        assert not found, found

    hold(packs(), check, EXAMPLES // SHARE, seed, KEPT)


def test_a_wrong_pack_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Pack(causal=True, grads="k")
    assert not wrong(pack, "reference", "cpu")
    attend = fastattn.varlen_attention
    monkeypatch.setattr(fastattn, "varlen_attention", lambda *args, causal, **rest: attend(*args, causal=False, **rest))
    assert wrong(pack, "reference", "cpu")
