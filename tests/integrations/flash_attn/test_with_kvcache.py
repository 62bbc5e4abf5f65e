"""`flash_attn_with_kvcache` against loops in float64, on drawn arguments: what it returns, and what the cache holds."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, TOLERANCE, relative_error
from flash_reference import Rules, rotate, sequence
from torch import Tensor

import fastattn
from fastattn.flash import flash_attn_with_kvcache
from fastattn.integrations.flash_attn import store as storing

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported


class Cache:
    """A cache drawn at random, filled with `held` tokens a row and NaN elsewhere: in rows or in pages."""

    def __init__(
        self, rng: random.Random, batch: int, capacity: int, heads: int, dims: Any, dtype: torch.dtype
    ) -> None:
        self.held = [rng.randint(0, capacity) for _ in range(batch)]
        self.capacity, self.index, self.table = capacity, None, None
        kind = rng.choice(["rows", "rows", "more", "index", "pages", "pages"])
        rows = batch + (0 if kind == "rows" else 2)
        size = capacity
        if kind == "index":
            self.index = torch.randperm(rows)[:batch].int()
        if kind == "pages":
            size = rng.choice([n for n in (1, 2, 3, 4, 6) if capacity % n == 0])
            rows = batch * capacity // size + 2
            self.table = torch.randperm(rows)[: batch * capacity // size].reshape(batch, -1).int()
        wide = rng.random() < 0.5  # a piece of a bigger buffer, with heads before tokens
        self.tensors = []
        for dim in dims:
            x = torch.full((rows, size, heads, dim), torch.nan, dtype=dtype)
            if wide:
                x = torch.full((rows, heads, size + 1, dim), torch.nan, dtype=dtype)[:, :, 1:].transpose(1, 2)
            self.tensors.append(x)
        for b, n in enumerate(self.held):
            for j in range(n):
                for x in self.tensors:
                    x[self.place(b, j)] = torch.randn(heads, x.shape[3]).to(dtype)

    def place(self, b: int, j: int) -> tuple[int, int]:
        if self.table is not None:
            size = self.tensors[0].shape[1]
            return int(self.table[b, j // size]), j % size
        return (b if self.index is None else int(self.index[b])), j

    def row(self, x: Tensor, b: int, tokens: int) -> Tensor:
        """The first tokens of a row of one of the tensors, or of a copy of it."""
        if not tokens:
            return x.new_zeros(0, *x.shape[2:])
        return torch.stack([x[self.place(b, j)] for j in range(tokens)])


@pytest.mark.parametrize("number", range(160))
def test_with_kvcache(number: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    if interpreted := rng.random() < 0.15 and not torch.cuda.is_available():
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")  # the kernel stores, and decodes where it can
    batch, capacity = rng.choice([1, 2, 3]), rng.choice([6, 12])
    group, kv_heads = rng.choice([(1, 1), (1, 2), (2, 2), (3, 1)])
    heads, dims = group * kv_heads, (rng.choice([8, 16]), 8)
    dtype = rng.choice([FP32, FP32, BF16, FP16] if interpreted else [FP32, FP32, FP64, BF16, FP16])
    cache = Cache(rng, batch, capacity, kv_heads, dims, dtype)
    queries = rng.choice([1, 1, 3, 4])
    rules = Rules(
        scale=rng.choice([None, 0.4]),
        causal=rng.random() < 0.5,
        window=rng.choice([(-1, -1), (-1, -1), (3, 1), (2, None)]),
        softcap=rng.choice([0.0, 0.0, 2.0]),
    )
    options: dict[str, Any] = {
        "softmax_scale": rules.scale,
        "causal": rules.causal,
        "window_size": rules.window,
        "softcap": rules.softcap,
        "return_softmax_lse": True,
        "cache_batch_idx": cache.index,
        "num_splits": rng.choice([0, 1, 3]),
    }
    if cache.table is not None:
        options[rng.choice(["block_table", "page_table"])] = cache.table
    new = rng.choice([0, queries, queries, 2])
    if new:
        cache.held = [min(n, capacity - max(new, queries)) for n in cache.held]
    if integer := rng.random() < 0.25:
        cache.held = [min(cache.held)] * batch
    whole = not new and rng.random() < 0.2 and cache.held == [capacity] * batch
    if not whole:
        options["cache_seqlens"] = cache.held[0] if integer else torch.tensor(cache.held, dtype=torch.int32)
    slopes = torch.rand(rng.choice([(heads,), (batch, heads)])) if rng.random() < 0.35 else None
    sinks = torch.randn(heads) if rng.random() < 0.2 else None
    options |= {"alibi_slopes": slopes, "learnable_sink": sinks}
    leftpad = [0] * batch
    if rng.random() < 0.3:
        leftpad = [rng.randint(0, n) for n in cache.held]
        options["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32)

    q = torch.randn(batch, queries, heads, dims[0]).to(dtype)
    fresh = [torch.randn(batch, new, kv_heads, dim).to(dtype) for dim in dims] if new else [None, None]
    want_q, want_k = q.double(), fresh[0] if fresh[0] is None else fresh[0].double()
    if new and rng.random() < 0.5:
        pairs, interleaved = dims[0] // rng.choice([2, 4]), rng.random() < 0.5
        cos, sin = (torch.rand(capacity + 1, pairs).mul(2).sub(1).to(dtype) for _ in "cs")
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        starts = cache.held
        if rng.random() < 0.3:
            starts = [rng.randint(0, 1) for _ in cache.held]
            options["rotary_seqlens"] = torch.tensor(starts, dtype=torch.int32)
        step = int(rules.causal or rules.window != (-1, -1))
        tables = cos.double(), sin.double()
        want_q, want_k = (
            torch.stack([rotate(x[b], *tables, starts[b], s, interleaved) for b in range(batch)])
            for x, s in ((want_q, step), (want_k, 1))
        )
        want_q = want_q.to(dtype).double()
    before = [x.clone() for x in cache.tensors]
    addresses = [x.data_ptr() for x in cache.tensors]

    out, lse = flash_attn_with_kvcache(q, *cache.tensors, *fresh, **options)

    assert [x.data_ptr() for x in cache.tensors] == addresses
    stored = [x.clone() for x in before]
    for b, n in enumerate(cache.held):
        for i in range(new):
            stored[0][cache.place(b, n + i)] = want_k[b, i].to(dtype)
            stored[1][cache.place(b, n + i)] = fresh[1][b, i]
    assert torch.equal(cache.tensors[1].nan_to_num(99), stored[1].nan_to_num(99)), "values are stored as they are"
    exact = "rotary_cos" not in options
    tolerance = {} if dtype in (FP32, FP64) else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(
        cache.tensors[0], stored[0], equal_nan=True, **({"rtol": 0, "atol": 0} if exact else tolerance)
    )

    forward = TOLERANCE[dtype][0]
    for b, n in enumerate(cache.held):
        keys, values = (cache.row(x, b, n + new).double() for x in cache.tensors)
        if slopes is not None:  # an additive mask hides what comes before the first key: it has to be finite
            keys, values = keys.nan_to_num(), values.nan_to_num()
        row = None if slopes is None else (slopes if slopes.dim() == 1 else slopes[b]).double()
        sink = None if sinks is None else sinks.double()
        want, want_lse = sequence(want_q[b], keys, values, rules, row, sink, leftpad[b])
        assert relative_error(out[b], want, 0.1) < 3 * forward
        seen = want_lse > -torch.inf
        assert torch.equal(lse[b] > -torch.inf, seen)
        torch.testing.assert_close(lse[b][seen].double(), want_lse[seen], rtol=2e-3, atol=2e-3)
    assert out.shape == (batch, queries, heads, dims[1]) and lse.shape == (batch, heads, queries)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == (FP64 if dtype == FP64 else FP32)


@pytest.mark.parametrize("number", range(20))
def test_packed_queries(number: int, seed: int) -> None:
    rng = random.Random(seed)
    batch, capacity, heads, dims = rng.choice([1, 3]), 6, 2, (8, 8)
    cache = Cache(rng, batch, capacity, 1, dims, FP32)
    lengths = [rng.randint(0, 3) for _ in range(batch)]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    rules = Rules(causal=rng.random() < 0.6, window=rng.choice([(-1, -1), (2, 1)]))
    slopes = torch.rand(heads) if rng.random() < 0.4 else None
    leftpad = [rng.randint(0, n) for n in cache.held] if rng.random() < 0.4 else None
    q = torch.randn(sum(lengths), heads, dims[0])
    out, lse = flash_attn_with_kvcache(
        q,
        *cache.tensors,
        cache_seqlens=torch.tensor(cache.held, dtype=torch.int32),
        cu_seqlens_q=cu,
        max_seqlen_q=max(lengths),
        cache_batch_idx=cache.index,
        block_table=cache.table,
        cache_leftpad=None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32),
        causal=rules.causal,
        window_size=rules.window,
        alibi_slopes=slopes,
        return_softmax_lse=True,
    )
    assert out.shape == q.shape and lse.shape == (heads, len(q))
    for b, n in enumerate(cache.held):
        keys, values = (cache.row(x, b, n).double() for x in cache.tensors)
        rows = slice(int(cu[b]), int(cu[b + 1]))
        first = 0 if leftpad is None else leftpad[b]
        want, want_lse = sequence(q[rows].double(), keys, values, rules, slopes, None, first)
        torch.testing.assert_close(out[rows].double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows].double(), want_lse, rtol=1e-5, atol=1e-5)


def a_step(capacity: int = 6, new: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """q, k_cache, v_cache for two rows; k, v."""
    caches = [torch.zeros(2, capacity, 2, 8) for _ in "kv"]
    return [torch.randn(2, 1, 4, 8), *caches], [torch.randn(2, new, 2, 8) for _ in "kv"]


def test_a_loop_of_steps() -> None:
    """As a model decodes: one cache, whose lengths the caller counts, on the device or on the host."""
    (_, *caches), _ = a_step(8)
    others = [x.clone() for x in caches]
    lengths = torch.zeros(2, dtype=torch.int32)
    q, k, v = (torch.randn(2, 8, heads, 8) for heads in (4, 2, 2))
    want = fastattn.flash_attn_func(q, k, v, causal=True)
    at = 0
    for tokens in (3, 1, 1, 2, 1):
        step = [x[:, at : at + tokens] for x in (q, k, v)]
        out = flash_attn_with_kvcache(step[0], *caches, *step[1:], cache_seqlens=lengths, causal=True)
        torch.testing.assert_close(out, want[:, at : at + tokens], rtol=1e-5, atol=1e-5)
        out = flash_attn_with_kvcache(step[0], *others, *step[1:], cache_seqlens=at, causal=True)
        torch.testing.assert_close(out, want[:, at : at + tokens], rtol=1e-5, atol=1e-5)
        lengths += tokens
        at += tokens
    assert torch.equal(caches[0], k) and torch.equal(others[1], v)


def test_what_does_not_fit_is_dropped() -> None:
    (q, *caches), (k, v) = a_step(4, new=3)
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=torch.tensor([3, 1], dtype=torch.int32))
    assert torch.equal(caches[0][0, 3], k[0, 0]) and torch.equal(caches[0][1, 1:], k[1])
    assert not caches[0][0, :3].any() and bool(out.isfinite().all())


def test_it_has_no_graph() -> None:
    """Else a loop of steps would keep all of them."""
    (q, *caches), (k, v) = a_step()
    out = flash_attn_with_kvcache(q.requires_grad_(), *caches, k.requires_grad_(), v, cache_seqlens=0)
    assert not out.requires_grad and not caches[0].requires_grad


def test_it_casts_to_the_caches_dtype() -> None:
    (q, *_), (k, v) = a_step()
    caches = [torch.zeros(2, 6, 2, 8, dtype=BF16) for _ in "kv"]
    flash_attn_with_kvcache(q.bfloat16(), *caches, k, v, cache_seqlens=2)
    assert torch.equal(caches[0][:, 2], k[:, 0].bfloat16())


@pytest.mark.parametrize("paging", ["", "rows", "pages"])
def test_the_kernel_stores_as_torch_does(paging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tokens that have no place: of rows and pages that are not there, beyond the end, before the beginning."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("FASTATTN_INTERPRET", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    starts = torch.tensor([0, 5, -2, 9], dtype=torch.int32, device=device)
    rows = torch.tensor([6, -1, 2, 0], dtype=torch.int32, device=device) if paging == "rows" else None
    table = (
        torch.tensor([[5, 0], [3, -1], [7, 1], [2, 4]], dtype=torch.int32, device=device) if paging == "pages" else None
    )
    k, v = torch.randn(4, 3, 2, 24, device=device)[..., ::2], torch.randn(4, 2, 3, 5, device=device).transpose(1, 2)
    places = storing.Places(starts, rows, table)
    found = []
    for function in (storing.store, storing._store_by_torch):
        keys, values = torch.zeros(7, 4, 2, 12, device=device), torch.zeros(7, 2, 4, 5, device=device).transpose(1, 2)
        function(keys, values, k, v, places)
        found.append((keys, values))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert int(found[0][0].any(-1).any(-1).sum()) == {"": 4, "rows": 4, "pages": 3}[paging]
