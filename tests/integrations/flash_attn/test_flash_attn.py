"""`flash_attn_func` and `flash_attn_varlen_func` against loops in float64, on drawn arguments."""

from __future__ import annotations

import random
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, TOLERANCE, relative_error
from flash_reference import LAYOUTS, Rules, sequence
from torch import Tensor

from fastattn.flash import (
    flash_attn_func,
    flash_attn_varlen_func,
)

DTYPES = (FP32, FP32, FP64, BF16, FP16)


@dataclass
class Drawn:
    """Arguments drawn at random."""

    heads: int
    kv_heads: int
    dims: tuple[int, int]
    dtype: torch.dtype
    rules: Rules
    slopes: str  #: "", "h" or "bh"
    sinks: bool
    options: dict[str, Any]  #: of the function under test, without tensors

    @staticmethod
    def of(rng: random.Random) -> Drawn:
        group, kv_heads = rng.choice([(1, 1), (1, 2), (2, 2), (3, 1)])
        dim = rng.choice([4, 8, 16, 24])
        slopes = rng.choice(["", "", "h", "bh"])
        rules = Rules(
            scale=rng.choice([None, 0.3]),
            causal=rng.random() < 0.5,
            window=rng.choice([(-1, -1), (-1, -1), (3, 1), (2, -1), (None, 2), (0, 0)]),
            softcap=rng.choice([0.0, 0.0, 2.0]),
        )
        options = {
            "softmax_scale": rules.scale,
            "causal": rules.causal,
            "window_size": rules.window,
            "softcap": rules.softcap,
            "deterministic": rng.random() < 0.3,
            "return_attn_probs": rng.random() < 0.7,
        }
        sinks = rng.random() < 0.2
        dims = (dim, rng.choice([dim, 8]))
        return Drawn(group * kv_heads, kv_heads, dims, rng.choice(DTYPES), rules, slopes, sinks, options)

    def tensors(self, rng: random.Random, q: tuple[int, ...], k: tuple[int, ...]) -> list[Tensor]:
        """q, k, v with these sizes before heads and dims, in odd layouts, as leaves."""
        shapes = [
            (*q, self.heads, self.dims[0]),
            (*k, self.kv_heads, self.dims[0]),
            (*k, self.kv_heads, self.dims[1]),
        ]
        layouts = [rng.choice([*LAYOUTS.values()]) for _ in shapes]
        return [layout(torch.randn(shape).to(self.dtype)).requires_grad_() for shape, layout in zip(shapes, layouts)]

    def extras(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Slopes and sinks."""
        shape = (self.heads,) if self.slopes == "h" else (batch, self.heads)
        return torch.rand(shape) if self.slopes else None, torch.randn(self.heads) if self.sinks else None


def of_row(slopes: Tensor | None, b: int) -> Tensor | None:
    return None if slopes is None else (slopes if slopes.dim() == 1 else slopes[b]).double()


def wide(x: Tensor | None) -> Any:
    return None if x is None else x.detach().double().requires_grad_()


def compare(drawn: Drawn, got: Any, want: tuple[Tensor, Tensor], leaves: list[Tensor], exact: list[Tensor]) -> None:
    """Output, log-sum-exp if it was asked for, and the gradients of both."""
    forward, backward = TOLERANCE[drawn.dtype]
    out, lse = (got[0], got[1]) if drawn.options["return_attn_probs"] else (got, None)
    assert out.dtype == drawn.dtype and out.is_contiguous()
    # Twice what the whole library allows itself: errors of so few numbers do not average out.
    assert relative_error(out, want[0]) < 2 * forward
    upstream = torch.randn_like(want[0]).to(drawn.dtype)
    ours, theirs = (out * upstream).sum(), (want[0] * upstream.double()).sum()
    if lse is not None:
        assert got[2].numel() == 0
        assert lse.dtype == (FP64 if drawn.dtype == FP64 else FP32)
        assert lse.shape == want[1].shape
        seen = want[1] > -torch.inf
        assert torch.equal(lse > -torch.inf, seen)
        torch.testing.assert_close(
            lse[seen].double(), want[1][seen], rtol=2e-3 if drawn.dtype == BF16 else 1e-4, atol=1e-3
        )
        ours, theirs = ours + lse[seen].sum(), theirs + want[1][seen].sum()
    if not any(x.numel() for x in exact) or not theirs.requires_grad:
        return
    for x, found, right in zip(leaves, torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, exact)):
        assert found.shape == x.shape and found.dtype == x.dtype
        floor = 0.5 * right.numel() ** 0.5 * (0.1 if drawn.dtype in (FP32, FP64) else 1.0)
        assert relative_error(found, right, floor) < 3 * backward


@pytest.mark.parametrize("number", range(120))
def test_func(number: int, seed: int) -> None:
    rng = random.Random(seed)
    drawn = Drawn.of(rng)
    batch, queries, keys = rng.choice([1, 2]), rng.choice([1, 3, 6]), rng.choice([1, 4, 6, 9])
    leaves = drawn.tensors(rng, (batch, queries), (batch, keys))
    slopes, sinks = drawn.extras(batch)
    got = flash_attn_func(*leaves, alibi_slopes=slopes, learnable_sink=sinks, **drawn.options)
    exact = [wide(x) for x in leaves]
    rows = [sequence(*(x[b] for x in exact), drawn.rules, of_row(slopes, b), wide(sinks)) for b in range(batch)]
    compare(drawn, got, (torch.stack([o for o, _ in rows]), torch.stack([l for _, l in rows])), leaves, exact)


@pytest.mark.parametrize("number", range(120))
def test_varlen(number: int, seed: int) -> None:
    """Sequences apart, some empty, some of which only a part is used, in pages or not."""
    rng = random.Random(seed)
    drawn = Drawn.of(rng)
    count = rng.choice([1, 2, 3])
    q_lengths, k_lengths = ([rng.choice([0, 1, 2, 4, 5]) for _ in range(count)] for _ in "qk")
    if same := rng.random() < 0.3:
        k_lengths = q_lengths
    paging = not same and rng.random() < 0.3
    before, behind = rng.choice([(0, 0), (1, 2)])  # tokens of no sequence
    cu_q, cu_k = (cumulative(lengths, before) for lengths in (q_lengths, k_lengths))
    total_q, total_k = (before + sum(lengths) + behind for lengths in (q_lengths, k_lengths))
    leaves = drawn.tensors(rng, (total_q,), (total_k,))
    slopes, sinks = drawn.extras(count)
    used_q, used_k = (
        [rng.randint(0, n) for n in lengths] if rng.random() < 0.25 else None for lengths in (q_lengths, k_lengths)
    )
    options = drawn.options | {
        "seqused_q": None if used_q is None else torch.tensor(used_q, dtype=torch.int32),
        "seqused_k": None if used_k is None else torch.tensor(used_k, dtype=torch.int32),
    }
    k, v = leaves[1:]
    if paging:
        k, v, options["block_table"] = in_pages([k, v], cu_k, rng)
    got = flash_attn_varlen_func(
        leaves[0],
        k,
        v,
        cu_q,
        cu_q if same else cu_k,
        max(q_lengths) + rng.choice([0, 3]),
        max(k_lengths) + rng.choice([0, 3]),
        alibi_slopes=slopes,
        learnable_sink=sinks,
        **options,
    )
    exact = [wide(x) for x in leaves]
    zero = sum(x.sum() for x in exact) * 0.0
    out = torch.zeros(total_q, drawn.heads, drawn.dims[1]).double() + zero
    lse = torch.full((drawn.heads, total_q), -torch.inf).double() + zero
    if sinks is not None and not (paging or slopes is not None):
        lse = sinks.double()[:, None].expand(-1, total_q) + zero  # a row that sees nothing has its sink
    for n in range(count):
        rows = slice(int(cu_q[n]), int(cu_q[n]) + (q_lengths if used_q is None else used_q)[n])
        keys = slice(int(cu_k[n]), int(cu_k[n]) + (k_lengths if used_k is None else used_k)[n])
        o, l = sequence(exact[0][rows], exact[1][keys], exact[2][keys], drawn.rules, of_row(slopes, n), wide(sinks))
        out = out.index_copy(0, torch.arange(rows.start, rows.stop), o)
        lse = lse.index_copy(1, torch.arange(rows.start, rows.stop), l)
    compare_packed(drawn, got, (out, lse), leaves, exact, used_q, sinks)


def compare_packed(
    drawn: Drawn,
    got: Any,
    want: tuple[Tensor, Tensor],
    leaves: list[Tensor],
    exact: list[Tensor],
    used_q: list[int] | None,
    sinks: Tensor | None,
) -> None:
    if sinks is not None and drawn.options["return_attn_probs"]:
        # The log-sum-exp of queries of no sequence is nobody's: only that of the others is compared.
        got = (got[0], torch.where(want[1] > -torch.inf, got[1], want[1].to(got[1].dtype)), got[2])
    compare(drawn, got, want, leaves, exact)


def cumulative(lengths: list[int], start: int = 0) -> Tensor:
    return torch.tensor([start, *lengths], dtype=torch.int32).cumsum(0).int()


def in_pages(tensors: list[Tensor], cu: Tensor, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences of each tensor in pages that lie anywhere, and their table; NaN where nobody's tokens are."""
    size, count = rng.choice([1, 2, 4]), len(cu) - 1
    most = max(int(n) for n in cu.diff()) // size + 1
    pool = count * most + 2
    table = torch.randperm(pool)[: count * most].reshape(count, most).int()
    found = []
    for x in tensors:
        pages = x.detach().new_full((pool, size, *x.shape[1:]), torch.nan)
        for n in range(count):
            for i in range(int(cu[n + 1] - cu[n])):
                pages[table[n, i // size], i % size] = x.detach()[int(cu[n]) + i]
        found.append(_Pages.apply(x, pages, cu, table))
    return found[0], found[1], table


class _Pages(torch.autograd.Function):
    """So that gradients of pages are those of the tokens in them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pages: Tensor, cu: Tensor, table: Tensor) -> Tensor:
        ctx.size, ctx.cu, ctx.table = x.shape, cu, table
        return pages.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found, size = gradient.new_zeros(ctx.size), gradient.shape[1]
        for n in range(len(ctx.cu) - 1):
            for i in range(int(ctx.cu[n + 1] - ctx.cu[n])):
                found[int(ctx.cu[n]) + i] = gradient[ctx.table[n, i // size], i % size]
        return found, None, None, None


def test_a_deterministic_backward_gives_its_memory_back() -> None:
    """With the first backward, unless the graph is retained: not with the loss, which a training loop keeps."""
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    out = flash_attn_func(q, k, v, deterministic=True)
    loss, node = out.sum(), out.grad_fn
    while not hasattr(node, "inside"):  # (views may come after it)
        assert node is not None
        node = node.next_functions[0][0]
    held = weakref.ref(node.inside[0])
    del out
    loss.backward(retain_graph=True)
    assert held() is not None
    loss.backward()
    assert held() is None
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
